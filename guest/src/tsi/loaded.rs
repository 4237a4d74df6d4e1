//! The BPF programs on their way to a cgroup: which of them a box needs, loading them with their maps, before the box is
//! known if need be, and attaching them.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use mote_agent::instance::Prefix;

use super::destinations::{DESTINATION_LEN, PREFIX_LEN, destinations};
use super::program::Programs;
use crate::sys::bpf::{
    self, Created, Map, MapDefinition, ObjectDefinition, ProgramDefinition, Write,
};
use crate::sys::ring_buffer::RingBuffer;

// `TSI`, `TSI_RESOLVERS`, `TSI_LISTENERS`, `TSI_ALL` and `TSI_CLIENTS`, which the build script makes of the source.
include!(concat!(env!("OUT_DIR"), "/tsi.rs"));

/// The map that events come by, which is there even if no program of the box reports any.
const EVENTS: &str = "events";

/// What of TSI a box needs, beside the true addresses of clients of published ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Connections to the outside.
    pub outgoing: bool,
    /// Answers to clients of published UDP ports.
    pub answers: bool,
    /// Word of sockets that listen, and the loopback of the host's network, where nobody else does.
    pub listeners: bool,
}

impl Extent {
    /// Which object has what is needed: to verify what is not costs a start.
    fn object(self, has_resolvers: bool) -> &'static ObjectDefinition {
        match self {
            // Such a box has no UDP ports published.
            Extent { listeners: true, .. } => &TSI_LISTENERS,
            Extent { outgoing: true, answers: true, .. } => &TSI_ALL,
            Extent { outgoing: true, answers: false, .. } if has_resolvers => &TSI_RESOLVERS,
            Extent { outgoing: false, answers: true, .. } => &TSI_CLIENTS,
            _ => &TSI,
        }
    }

    /// Whether the program of this name is needed.
    fn includes(self, name: &str) -> bool {
        let shows_clients = name.starts_with("tsi_getpeername") || name.starts_with("tsi_bind");
        let follows_outgoing = matches!(name, "tsi_egress" | "tsi_release");
        self.outgoing || shows_clients || self.answers && !follows_outgoing
    }

    /// The programs of the object that are needed.
    fn programs(
        self,
        object: &ObjectDefinition,
    ) -> impl Iterator<Item = &'static ProgramDefinition> {
        object.programs.iter().filter(move |program| self.includes(program.name))
    }

    /// Whether a map of the object is needed.
    fn uses(self, object: &ObjectDefinition, map: &MapDefinition) -> bool {
        let index = object.maps.iter().position(|other| other.name == map.name);
        map.name == EVENTS
            || index.is_some_and(|index| {
                self.programs(object).any(|program| program.maps.contains(&index))
            })
    }
}

/// What most boxes need, and what is loaded before a box is known.
const USUAL: (Extent, bool) = (Extent { outgoing: true, answers: false, listeners: false }, false);

/// Programs that are in the kernel with their maps, empty ones, and are attached to nothing.
pub struct Loaded {
    /// What they are for, and whether they have a place for resolvers.
    purpose: (Extent, bool),
    programs: Vec<OwnedFd>,
    maps: Maps,
}

impl Loaded {
    /// Loads the programs that a box of this extent needs, with or without resolvers of its own.
    ///
    /// # Errors
    /// If the kernel refuses the programs or their maps.
    pub fn load(extent: Extent, has_resolvers: bool) -> Result<Self, String> {
        let object = extent.object(has_resolvers);
        let maps = Maps::create(object, extent)?;
        let programs = extent.programs(object).map(|program| {
            bpf::load_program(program, object.license, &maps.descriptors)
                .map_err(|e| format!("load the BPF program {}: {e}", program.name))
        });
        let programs = programs.collect::<Result<_, String>>()?;
        Ok(Loaded { purpose: (extent, has_resolvers), programs, maps })
    }

    /// Those that most boxes need.
    ///
    /// # Errors
    /// As for [`Loaded::load`].
    pub fn usual() -> Result<Self, String> {
        Loaded::load(USUAL.0, USUAL.1)
    }

    /// Those that most boxes need, from the [`Loaded::descriptors`] of such; `None` if these are not as many.
    pub fn from_descriptors(descriptors: Vec<OwnedFd>) -> Option<Self> {
        let object = USUAL.0.object(USUAL.1);
        let mut descriptors = descriptors.into_iter();
        let maps = Maps::of(object, |definition| {
            if !USUAL.0.uses(object, definition) {
                return Some(None);
            }
            descriptors.next().map(|fd| Some(Created::adopt(fd, definition)))
        })?;
        let programs: Vec<_> = descriptors.collect();
        let whole = programs.len() == USUAL.0.programs(object).count();
        whole.then_some(Loaded { purpose: USUAL, programs, maps })
    }

    /// Every descriptor of this: of the maps, and then of the programs.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let maps = self.maps.created.iter().flatten().map(AsFd::as_fd);
        maps.chain(self.programs.iter().map(AsFd::as_fd))
    }

    /// The same programs and maps once more.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub fn try_clone(&self) -> io::Result<Self> {
        let programs = self.programs.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>()?;
        Ok(Loaded { purpose: self.purpose, programs, maps: self.maps.try_clone()? })
    }

    /// Whether this is what such a box needs.
    pub fn is_for(&self, extent: Extent, has_resolvers: bool) -> bool {
        self.purpose == (extent, has_resolvers)
    }

    /// Attaches the programs to a cgroup. `resolvers`, `shared` and `prefixes` are as in [`destinations`], and `own` are the
    /// box's addresses beside loopback's.
    ///
    /// # Errors
    /// If the kernel refuses what is to be in a map, or to attach them.
    pub fn attach(
        self,
        cgroup: BorrowedFd<'_>,
        resolvers: &[Ipv6Addr],
        shared: Option<&[IpAddr]>,
        prefixes: &[Prefix],
        own: Vec<IpAddr>,
    ) -> Result<Programs, String> {
        let Loaded { purpose: (extent, has_resolvers), programs, mut maps } = self;
        if let Some(known) = maps.take::<PREFIX_LEN, DESTINATION_LEN>("destinations")? {
            for (prefix, destination) in destinations(resolvers, shared, prefixes) {
                known
                    .set(&prefix, &destination, Write::Any)
                    .map_err(|e| format!("fill the map destinations of the BPF programs: {e}"))?;
            }
        }
        let definitions = extent.programs(extent.object(has_resolvers));
        let links = definitions.zip(&programs).map(|(definition, program)| {
            bpf::attach_to_cgroup(program.as_fd(), cgroup, definition.attach_type)
                .map_err(|e| format!("attach the BPF program {}: {e}", definition.name))
        });
        Ok(Programs {
            _links: links.collect::<Result<_, String>>()?,
            connected: maps.take("flows")?.ok_or("the BPF programs have no map flows")?,
            datagrams: maps.take("datagram_flows")?,
            clients: maps.take("clients")?,
            own,
            events: maps.take_events()?,
        })
    }
}

/// The maps that a box's programs refer to.
struct Maps {
    /// By index in the object; one that nobody refers to is not there, nor is one that was taken.
    created: Vec<Option<Created>>,
    definitions: &'static [MapDefinition],
    /// Of all, by the same index; -1 for one that nobody refers to.
    descriptors: Vec<RawFd>,
}

impl Maps {
    fn create(object: &ObjectDefinition, extent: Extent) -> Result<Self, String> {
        let mut failed = None;
        let maps = Maps::of(object, |definition| {
            let create = || {
                bpf::create_map(definition).map_err(|e| {
                    format!("create the map {} of the BPF programs: {e}", definition.name)
                })
            };
            extent
                .uses(object, definition)
                .then(create)
                .transpose()
                .map_err(|e| failed = Some(e))
                .ok()
        });
        maps.ok_or_else(|| failed.unwrap_or_default())
    }

    /// The object's maps, each of which `map` makes, unless it is not needed; `None` if it makes none of one that is.
    fn of(
        object: &ObjectDefinition,
        map: impl FnMut(&'static MapDefinition) -> Option<Option<Created>>,
    ) -> Option<Self> {
        let created = object.maps.iter().map(map).collect::<Option<Vec<_>>>()?;
        let descriptor = |map: &Option<Created>| map.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let descriptors = created.iter().map(descriptor).collect();
        Some(Maps { created, definitions: object.maps, descriptors })
    }

    fn try_clone(&self) -> io::Result<Self> {
        let created =
            self.created.iter().map(|map| map.as_ref().map(Created::try_clone).transpose());
        let created = created.collect::<Result<_, _>>()?;
        Ok(Maps { created, definitions: self.definitions, descriptors: self.descriptors.clone() })
    }

    fn take_created(&mut self, name: &str) -> Option<Created> {
        let index = self.definitions.iter().position(|definition| definition.name == name)?;
        self.created[index].take()
    }

    /// Takes a map, for as long as it shall be open; `None` if nobody refers to it.
    fn take<const K: usize, const V: usize>(
        &mut self,
        name: &str,
    ) -> Result<Option<Map<K, V>>, String> {
        self.take_created(name)
            .map(Map::new)
            .transpose()
            .map_err(|e| format!("open the map {name} of the BPF programs: {e}"))
    }

    fn take_events(&mut self) -> Result<RingBuffer, String> {
        self.take_created(EVENTS)
            .map(RingBuffer::new)
            .unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))
            .map_err(|e| format!("map the ring buffer of the BPF programs: {e}"))
    }
}
