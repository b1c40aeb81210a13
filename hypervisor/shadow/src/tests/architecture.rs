//! The SDM's rules on access rights, written a second time and with nothing of the crate's own: what the model
//! processor goes by, and what the shadow is compared with.

use crate::{Access, Kind};

/// The control bits that rights depend on.
#[derive(Clone, Copy, Debug)]
pub struct Controls {
    pub wp: bool,
    pub smep: bool,
    pub smap: bool,
    /// XD bits count (EFER.NXE, and a format that has them).
    pub xd: bool,
}

/// What the entries on a path say together: R/W and U/S set in every one, XD set in any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    pub all_writable: bool,
    pub all_user: bool,
    pub any_xd: bool,
}

impl Path {
    pub const OPEN: Path = Path { all_writable: true, all_user: true, any_xd: false };

    /// One entry further down.
    pub fn through(self, entry: u64) -> Path {
        Path {
            all_writable: self.all_writable && entry & 0b010 != 0,
            all_user: self.all_user && entry & 0b100 != 0,
            any_xd: self.any_xd || entry >> 63 == 1,
        }
    }
}

/// Intel SDM Vol. 3, "Determination of Access Rights", sentence by sentence.
pub fn permitted(controls: Controls, path: Path, access: Access) -> bool {
    let executable = !(controls.xd && path.any_xd);
    if access.user {
        // "For user-mode accesses": never to a supervisor-mode address.
        if !path.all_user {
            return false;
        }
        return match access.kind {
            Kind::Read => true,
            Kind::Write => path.all_writable,
            Kind::Fetch => executable,
        };
    }
    // "For supervisor-mode accesses".
    let smap_stops = controls.smap && path.all_user && !access.smap_overridden;
    match access.kind {
        Kind::Read => !smap_stops,
        Kind::Write if smap_stops => false,
        Kind::Write => !controls.wp || path.all_writable,
        Kind::Fetch if controls.smep && path.all_user => false,
        Kind::Fetch => executable,
    }
}
