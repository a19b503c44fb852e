//! The software TLB: linear page to host address, by access mode and kind.
//!
//! Hit path: compare the page with the entry's tag, add the entry's addend. An entry that
//! needs a closer look (MMIO, read-only memory, a page that holds decoded code) has a bit set
//! in its tag and therefore never matches.

/// Entries for each half of the address space, mode and kind.
pub(crate) const HALF: usize = 256;
/// Entries of one kind in one mode.
pub(crate) const SIZE: usize = 2 * HALF;

/// Bit of a tag: never hit directly.
pub(crate) const SLOW: u64 = 1;
/// Bit of a tag: part of a 2 or 4 MiB page.
pub(crate) const LARGE: u64 = 1 << 1;
/// Bit of a tag: part of a 1 GiB page.
pub(crate) const HUGE: u64 = 1 << 2;
/// Index of the user's TLBs while alignment is checked: every access is looked at closely.
pub(crate) const MODE_ALIGNED: usize = 3;
/// No page has this tag.
const EMPTY: u64 = u64::MAX;

/// One translation.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Linear page address, or-ed with flags.
    pub tag: u64,
    /// Host address - linear address.
    pub add: u64,
}

const NO_ENTRY: Entry = Entry { tag: EMPTY, add: 0 };

/// What else is known about an entry: guest-physical page, with `LARGE` or `HUGE` in its low bits
/// (not in the tag: a large page must still hit).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Aux(u64);

const NO_AUX: Aux = Aux(EMPTY);

impl Aux {
    fn new(gpa: u64, size: u64) -> Self {
        Self(gpa & !0xfff | size)
    }

    /// The guest-physical page.
    #[inline(always)]
    pub(crate) fn gpa(self) -> u64 {
        self.0 & !0xfff
    }

    /// `LARGE`, `HUGE` or 0.
    fn size(self) -> u64 {
        self.0 & (LARGE | HUGE)
    }
}

/// Reads and writes in one access mode.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct TlbSet {
    pub read: [Entry; SIZE],
    pub write: [Entry; SIZE],
    pub read_aux: [Aux; SIZE],
    pub write_aux: [Aux; SIZE],
    used: [bool; 2],
    /// A non-global page of the upper half is in here.
    pub upper_local: bool,
}

/// Instruction fetches: linear page, mode, and guest-physical page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FetchEntry {
    pub tag: u64,
    pub to: Aux,
}

const NO_FETCH: FetchEntry = FetchEntry {
    tag: EMPTY,
    to: NO_AUX,
};

/// All TLBs of a vCPU.
#[derive(Debug)]
pub(crate) struct Tlbs {
    /// Data: supervisor with access to user pages, supervisor without (SMAP), user, user with
    /// alignment checks.
    pub data: [TlbSet; 4],
    /// Fetches by supervisor and by user.
    pub fetch: [[FetchEntry; SIZE]; 2],
    pub fetch_upper_local: bool,
    /// Physical address bits of this vCPU.
    pub phys_mask: u64,
    /// 2 MiB regions and 1 GiB regions (hashed) that large entries were made for.
    large: [u64; 16],
    huge: u64,
    /// The same for fetches.
    large_code: [u64; 16],
    huge_code: u64,
}

/// Slot of a linear address: halves apart, so that a CR3 switch clears only the lower one.
#[inline(always)]
pub(crate) fn slot(addr: u64) -> usize {
    ((addr >> 12) as usize & (HALF - 1)) | ((addr >> 63) as usize * HALF)
}

/// Marks the region of a large page at `addr`.
fn note_region(large: &mut [u64; 16], huge: &mut u64, addr: u64, size: u64) {
    // A 4 MiB page counts for both its 2 MiB regions.
    if size == LARGE {
        for region in [addr >> 21, addr >> 21 ^ 1] {
            large[(region >> 6) as usize % 16] |= 1 << (region % 64);
        }
    } else if size == HUGE {
        *huge |= 1 << (addr >> 30 & 63);
    }
}

impl TlbSet {
    fn clear_half(&mut self, half: usize) {
        if !self.used[half] {
            return;
        }
        let range = half * HALF..(half + 1) * HALF;
        self.read[range.clone()].fill(NO_ENTRY);
        self.write[range].fill(NO_ENTRY);
        self.used[half] = false;
        if half == 1 {
            self.upper_local = false;
        }
    }
}

impl Tlbs {
    pub(crate) fn new() -> Box<Self> {
        const EMPTY_SET: TlbSet = TlbSet {
            read: [NO_ENTRY; SIZE],
            write: [NO_ENTRY; SIZE],
            read_aux: [NO_AUX; SIZE],
            write_aux: [NO_AUX; SIZE],
            used: [false; 2],
            upper_local: false,
        };
        Box::new(Self {
            data: [EMPTY_SET; 4],
            fetch: [[NO_FETCH; SIZE]; 2],
            fetch_upper_local: false,
            phys_mask: (1 << 36) - 1,
            large: [0; 16],
            huge: 0,
            large_code: [0; 16],
            huge_code: 0,
        })
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        for set in &mut self.data {
            set.clear_half(0);
            set.clear_half(1);
        }
        for fetch in &mut self.fetch {
            fetch.fill(NO_FETCH);
        }
        self.fetch_upper_local = false;
        self.large = [0; 16];
        self.huge = 0;
        self.large_code = [0; 16];
        self.huge_code = 0;
    }

    /// Forgets what may be local to an address space.
    pub(crate) fn clear_local(&mut self) {
        for set in &mut self.data {
            set.clear_half(0);
            if set.upper_local {
                set.clear_half(1);
            }
        }
        for fetch in &mut self.fetch {
            fetch[..HALF].fill(NO_FETCH);
            if self.fetch_upper_local {
                fetch[HALF..].fill(NO_FETCH);
            }
        }
        self.fetch_upper_local = false;
    }

    /// Forgets the page of `addr`, however large it is. Whether code may have been found by more
    /// than its 4 KiB.
    pub(crate) fn clear_page(&mut self, addr: u64) -> bool {
        let page = addr & !0xfff;
        let i = slot(addr);
        for set in &mut self.data {
            if set.read[i].tag & !0xfff == page {
                set.read[i] = NO_ENTRY;
            }
            if set.write[i].tag & !0xfff == page {
                set.write[i] = NO_ENTRY;
            }
        }
        for fetch in &mut self.fetch {
            if fetch[i].tag & !0xfff == page {
                fetch[i] = NO_FETCH;
            }
        }
        let region = addr >> 21;
        let (word, bit) = ((region >> 6) as usize % 16, region % 64);
        if self.large[word] >> bit & 1 != 0 {
            self.clear_region(LARGE, addr, 22);
        }
        if self.huge >> (addr >> 30 & 63) & 1 != 0 {
            self.clear_region(HUGE, addr, 30);
        }
        (self.large_code[word] >> bit | self.huge_code >> (addr >> 30 & 63)) & 1 != 0
    }

    fn clear_region(&mut self, size: u64, addr: u64, shift: u32) {
        let hit = |tag: u64, entry_size: u64| entry_size == size && tag >> shift == addr >> shift;
        for set in &mut self.data {
            for i in 0..SIZE {
                if hit(set.read[i].tag, set.read_aux[i].size()) {
                    set.read[i] = NO_ENTRY;
                }
                if hit(set.write[i].tag, set.write_aux[i].size()) {
                    set.write[i] = NO_ENTRY;
                }
            }
        }
        for fetch in &mut self.fetch {
            for entry in fetch {
                if hit(entry.tag, entry.to.size()) {
                    *entry = NO_FETCH;
                }
            }
        }
    }

    fn note_size(&mut self, addr: u64, size: u64) {
        note_region(&mut self.large, &mut self.huge, addr, size);
    }

    /// Enters a data translation. `host` is null where there is no RAM: then the entry is
    /// slow in any case.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn fill(
        &mut self,
        mode: usize,
        write: bool,
        addr: u64,
        gpa: u64,
        host: *mut u8,
        slow: bool,
        global: bool,
        size: u64,
    ) {
        self.note_size(addr, size);
        let page = addr & !0xfff;
        let i = slot(addr);
        let set = &mut self.data[mode];
        let upper = addr >> 63 != 0;
        set.used[usize::from(upper)] = true;
        set.upper_local |= upper && !global;
        let entry = Entry {
            tag: page
                | if slow || host.is_null() || mode == MODE_ALIGNED {
                    SLOW
                } else {
                    0
                },
            add: (host as u64).wrapping_sub(page),
        };
        let aux = Aux::new(gpa, size);
        if write {
            set.write[i] = entry;
            set.write_aux[i] = aux;
        } else {
            set.read[i] = entry;
            set.read_aux[i] = aux;
        }
    }

    /// Enters a fetch translation.
    pub(crate) fn fill_fetch(&mut self, user: bool, addr: u64, gpa: u64, global: bool, size: u64) {
        self.note_size(addr, size);
        note_region(&mut self.large_code, &mut self.huge_code, addr, size);
        if addr >> 63 != 0 && !global {
            self.fetch_upper_local = true;
        }
        self.fetch[usize::from(user)][slot(addr)] = FetchEntry {
            tag: addr & !0xfff,
            to: Aux::new(gpa, size),
        };
    }

    /// From now on writes to the guest-physical page `gpa` need a closer look (it holds
    /// code). Whether one could go through directly before.
    pub(crate) fn slow_writes(&mut self, gpa: u64) -> bool {
        let mut found = false;
        for set in &mut self.data {
            if set.used == [false; 2] {
                continue;
            }
            for (entry, aux) in set.write.iter_mut().zip(&set.write_aux) {
                if aux.gpa() == gpa && entry.tag != EMPTY && entry.tag & SLOW == 0 {
                    entry.tag |= SLOW;
                    found = true;
                }
            }
        }
        found
    }

    /// Forgets all write translations.
    pub(crate) fn clear_writes(&mut self) {
        for set in &mut self.data {
            set.write.fill(NO_ENTRY);
        }
    }
}
