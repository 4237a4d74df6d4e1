//! A template's file, whatever its state says and with checksums that are right: it is refused, or every address in it
//! is one of the guest's RAM.

use std::fs::File;
use std::io::Write;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::memory;
use crate::sys;
use crate::template::file::{Template, header};

const RAM: u64 = 4 << 20;

pub fn run(data: &[u8]) {
    // The first byte says how many pages follow the state.
    let Some((pages, head)) = data.split_first() else { return };
    let pages = vec![1; usize::from(pages % 8) * 4096];
    let bytes = [header(head, &pages), head.to_vec()].concat();
    let len = bytes.len().next_multiple_of(4096) + pages.len();
    let Ok(mut file) = sys::sealed_memory_file(len as u64) else { return };
    let written = file.write_all(&bytes).and_then(|()| {
        std::os::unix::fs::FileExt::write_all_at(&file, &pages, (len - pages.len()) as u64)
    });
    written.expect("a file takes what it has room for");
    look_at(file);
}

fn look_at(file: File) {
    std::io::Seek::rewind(&mut &file).expect("a file");
    let Ok(template) = Template::read(file, RAM) else { return };
    let ram = memory::create_ram(RAM).expect("RAM");
    for (start, len) in template.places() {
        assert!(ram.check_range(GuestAddress(start), len as usize), "{start:#x} + {len:#x}");
    }
    template.fill(&ram).expect("its pages are those that were written");
}
