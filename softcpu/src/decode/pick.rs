//! From run-time numbers to the handlers made for them.

/// Picks one of the constants 0 to 8.
macro_rules! by_kind {
    ($k:expr, $c:ident => $x:expr) => {
        match $k {
            0 => {
                const $c: u8 = 0;
                $x
            }
            1 => {
                const $c: u8 = 1;
                $x
            }
            2 => {
                const $c: u8 = 2;
                $x
            }
            3 => {
                const $c: u8 = 3;
                $x
            }
            4 => {
                const $c: u8 = 4;
                $x
            }
            5 => {
                const $c: u8 = 5;
                $x
            }
            6 => {
                const $c: u8 = 6;
                $x
            }
            7 => {
                const $c: u8 = 7;
                $x
            }
            _ => {
                const $c: u8 = 8;
                $x
            }
        }
    };
}

/// Picks one of the constants 0 to 15.
macro_rules! by_condition {
    ($k:expr, $c:ident => $x:expr) => {
        match $k {
            0 => {
                const $c: u8 = 0;
                $x
            }
            1 => {
                const $c: u8 = 1;
                $x
            }
            2 => {
                const $c: u8 = 2;
                $x
            }
            3 => {
                const $c: u8 = 3;
                $x
            }
            4 => {
                const $c: u8 = 4;
                $x
            }
            5 => {
                const $c: u8 = 5;
                $x
            }
            6 => {
                const $c: u8 = 6;
                $x
            }
            7 => {
                const $c: u8 = 7;
                $x
            }
            8 => {
                const $c: u8 = 8;
                $x
            }
            9 => {
                const $c: u8 = 9;
                $x
            }
            10 => {
                const $c: u8 = 10;
                $x
            }
            11 => {
                const $c: u8 = 11;
                $x
            }
            12 => {
                const $c: u8 = 12;
                $x
            }
            13 => {
                const $c: u8 = 13;
                $x
            }
            14 => {
                const $c: u8 = 14;
                $x
            }
            _ => {
                const $c: u8 = 15;
                $x
            }
        }
    };
}

/// The four kinds of INC, DEC, NEG, NOT and of the BT family.
macro_rules! by_four {
    ($k:expr, $c:ident => $x:expr) => {
        match $k {
            0 => {
                const $c: u8 = 0;
                $x
            }
            1 => {
                const $c: u8 = 1;
                $x
            }
            2 => {
                const $c: u8 = 2;
                $x
            }
            _ => {
                const $c: u8 = 3;
                $x
            }
        }
    };
}

/// The shifts that are no rotates.
macro_rules! by_shift {
    ($k:expr, $c:ident => $x:expr) => {
        match $k {
            5 => {
                const $c: u8 = 5;
                $x
            }
            7 => {
                const $c: u8 = 7;
                $x
            }
            _ => {
                const $c: u8 = 4;
                $x
            }
        }
    };
}

/// The arithmetic that neither needs flags nor exists for them.
macro_rules! by_quiet {
    ($k:expr, $c:ident => $x:expr) => {
        match $k {
            0 => {
                const $c: u8 = 0;
                $x
            }
            1 => {
                const $c: u8 = 1;
                $x
            }
            4 => {
                const $c: u8 = 4;
                $x
            }
            5 => {
                const $c: u8 = 5;
                $x
            }
            _ => {
                const $c: u8 = 6;
                $x
            }
        }
    };
}

pub(crate) use {by_condition, by_four, by_kind, by_quiet, by_shift};
