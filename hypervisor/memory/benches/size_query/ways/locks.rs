//! KVM's shrinker of 2010: a plain count a guest under that guest's lock; who asks takes the lock of the list, and
//! under it each guest's.
//!
//! The locks are the standard library's and not spin locks: a thread may lose its processor while it holds one, which
//! cannot happen to a kernel's spin lock. Free, either is taken by one compare-and-exchange.

use std::sync::{Arc, Mutex};

use super::{Answer, Core, Way};

/// On lines of its own, as part of a `struct kvm` is.
#[repr(align(128))]
struct Guest {
    pages: Mutex<i64>,
}

pub struct Locks {
    list: Mutex<Vec<Arc<Guest>>>,
    /// Each core's way to a guest, which does not go through the list.
    guests: Vec<Arc<Guest>>,
}

impl Locks {
    pub fn new(guests: usize) -> Self {
        let guests: Vec<_> = (0..guests).map(|_| Arc::new(Guest { pages: Mutex::new(0) })).collect();
        Self { list: Mutex::new(guests.clone()), guests }
    }

    fn add(&self, guest: usize, pages: i64) {
        *self.guests[guest].pages.lock().expect("nobody panics") += pages;
    }
}

impl Way for Locks {
    type Core<'a> = &'a Self;

    fn core(&self, _: usize) -> &Self {
        self
    }

    fn query(&self) -> Answer {
        let list = self.list.lock().expect("nobody panics");
        Answer::plain(list.iter().map(|guest| *guest.pages.lock().expect("nobody panics")).sum())
    }
}

impl Core for &Locks {
    #[inline]
    fn allocated(&mut self, guest: usize) {
        self.add(guest, 1);
    }

    #[inline]
    fn freed(&mut self, guest: usize) {
        self.add(guest, -1);
    }
}
