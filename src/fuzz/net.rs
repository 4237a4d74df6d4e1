//! The network device with any driver and any passt. Whatever they do, the device does not loop for ever,
//! a driver's mistakes stop only its device, passt's only the link, and only whole frames arrive. And the
//! filter judges any frame.

use std::io::Write;

use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{Address, Bytes};

use super::Input;
use crate::policy::rules::{Action, Rules};
use crate::virtio::device::{F_EVENT_IDX, F_VERSION_1};
use crate::virtio::net::bench::*;
use crate::virtio::net::filter::Side;
use crate::virtio::net::passt::FRAME_LEN;

pub fn run(data: &[u8]) {
    judge(data);
    let mut input = Input(data);
    let mut bench = Bench::new(None);
    let mut stream = Vec::new();
    activate(&mut bench, &mut input);
    while !input.is_empty() {
        match input.u8() % 8 {
            0 => write(&mut bench, input.short()),
            1 | 2 => {
                let len = frame_len(&mut input);
                let frame = framed(&vec![input.u8(); len]);
                write(&mut bench, &frame);
            }
            3 | 4 => {
                let queue = usize::from(input.flag());
                let first = input.u8();
                let descriptors = descriptors(&mut input, first.into());
                bench.offer(queue, first.into(), &descriptors);
                bench.kick(queue);
            }
            5 => {
                let queue = QUEUES[usize::from(input.flag())];
                let at = queue.unchecked_add(u64::from(input.u16()) % 0x3000);
                bench.ram.write_slice(input.short(), at).expect("RAM");
            }
            6 => bench.kick(usize::from(input.flag())),
            _ => activate(&mut bench, &mut input),
        }
        stream.extend(bench.sent());
    }
    check_frames(&stream);
}

/// Any bytes as a frame, where nothing may go out. What is answered is a frame too.
fn judge(frame: &[u8]) {
    let mut filter = frame_filter(Rules { rules: Vec::new(), default: Action::Deny });
    filter.note(frame, Side::Passt);
    let admitted = filter.admits(frame, Side::Passt);
    if let Some(answer) = filter.answer() {
        assert!(!admitted && FRAME_LEN.contains(&answer.len()));
    }
}

fn activate(bench: &mut Bench, input: &mut Input<'_>) {
    let features = input.choose(&[FEATURES, F_VERSION_1, FEATURES | F_EVENT_IDX]);
    let (receive, transmit) = (descriptors(input, 0), descriptors(input, 0));
    bench.activate(features, &receive, &transmit);
}

/// Descriptors for a table, from this index on.
fn descriptors(input: &mut Input<'_>, first: u16) -> Vec<RawDescriptor> {
    let count = u16::from(input.u8() % 16).min(256 - first);
    (first..first + count)
        .map(|index| {
            let address = match input.u8() {
                0 => input.u64(),
                1 => QUEUES[0].0 + u64::from(input.u16()),
                buffer => BUFFERS + u64::from(buffer % 32) * BUFFER_STEP,
            };
            let len = match input.u8() {
                0 => input.u32(),
                1 => 65_536 + 12,
                2 => 65_535 + 12,
                len => 8 * u32::from(len),
            };
            let next = if input.u8() == 0 { input.u16() } else { index + 1 };
            Descriptor::new(address, len, u16::from(input.u8() % 8), next).into()
        })
        .collect()
}

fn frame_len(input: &mut Input<'_>) -> usize {
    match input.u8() {
        0 => *FRAME_LEN.end(),
        1 => FRAME_LEN.end() + 1,
        2 => input.u16().into(),
        len => len.into(),
    }
}

/// Writes as much as fits, if passt still has a connection.
fn write(bench: &mut Bench, bytes: &[u8]) {
    let _ = bench.passt.write(bytes);
    bench.run();
}

/// Checks that the device sends frames, of which the last may be incomplete.
fn check_frames(mut stream: &[u8]) {
    while let Some((prefix, rest)) = stream.split_first_chunk() {
        let len = u32::from_be_bytes(*prefix) as usize;
        assert!(FRAME_LEN.contains(&len), "a frame of {len} bytes");
        let Some(rest) = rest.get(len..) else { return };
        stream = rest;
    }
}
