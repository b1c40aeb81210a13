//! Addresses and page numbers, one type each.
//!
//! `Gva`: guest virtual; `Gpa`/`Gfn`: guest physical address / 4 KiB page number; `Hpa`/`Pfn`: host
//! physical address / 4 KiB page number. A `Gpa` becomes an `Hpa` only through the guest's memory slots.

use core::fmt;

/// log2 of the size of a page.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page (4 KiB).
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// 4 KiB pages in a 2 MiB block.
pub const BLOCK_PAGES: u64 = 512;
/// Bytes in a 2 MiB block.
pub const BLOCK_SIZE: u64 = BLOCK_PAGES * PAGE_SIZE;

macro_rules! newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

newtype! {
    /// A guest virtual (linear) address, in bytes.
    Gva
}
newtype! {
    /// A guest physical address, in bytes.
    Gpa
}
newtype! {
    /// A host physical address, in bytes.
    Hpa
}
newtype! {
    /// A guest physical page number (4 KiB units).
    Gfn
}
newtype! {
    /// A host physical page number (4 KiB units).
    Pfn
}

macro_rules! address_and_page {
    ($address:ident, $page:ident) => {
        impl $address {
            /// The page this address lies in.
            #[must_use]
            pub const fn page(self) -> $page {
                $page(self.0 >> PAGE_SHIFT)
            }
            /// Bytes from the start of the page, 0..4096.
            #[must_use]
            pub const fn offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
        }
        impl $page {
            /// The address of the page's first byte.
            #[must_use]
            pub const fn address(self) -> $address {
                $address(self.0 << PAGE_SHIFT)
            }
        }
    };
}

impl Gva {
    /// Bytes from the start of the page, 0..4096.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.0 & (PAGE_SIZE - 1)
    }
}

address_and_page!(Gpa, Gfn);
address_and_page!(Hpa, Pfn);
