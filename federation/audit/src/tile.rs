//! Tiles of 256 hashes and bundles of 256 entries (C2SP tlog-tiles): their paths and their bytes.

use ambit_model::{Code, Refusal};

/// Entries of a bundle, and hashes of a tile.
pub const WIDTH: u64 = 256;
/// Levels of the tree to a level of tiles.
pub const HEIGHT: u32 = 8;
/// Levels of tiles that a tree of [`crate::tree::SIZE_MAX`] has.
pub const LEVELS: u32 = 7;
/// Bytes of an entry: its length has two in a bundle.
pub const ENTRY_BYTES_MAX: usize = 0xffff;

/// What a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// Hashes: level, number, width.
    Hashes(u32, u64, u64),
    /// Entries: number, width.
    Entries(u64, u64),
}

/// `1234067` is `x001/x234/067`.
fn number(n: u64) -> String {
    let mut text = format!("{:03}", n % 1000);
    let mut rest = n / 1000;
    while rest > 0 {
        text = format!("x{:03}/{text}", rest % 1000);
        rest /= 1000;
    }
    text
}

fn partial(width: u64) -> String {
    if width == WIDTH { String::new() } else { format!(".p/{width}") }
}

impl Tile {
    /// Below the log's prefix: `tile/0/x001/067`, `tile/entries/000.p/3`.
    pub fn path(self) -> String {
        match self {
            Self::Hashes(level, n, width) => format!("tile/{level}/{}{}", number(n), partial(width)),
            Self::Entries(n, width) => format!("tile/entries/{}{}", number(n), partial(width)),
        }
    }
    /// Strict: one path for each tile.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub fn parse(path: &str) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::NotFound, "a tile's path (C2SP tlog-tiles)", path);
        let rest = path.strip_prefix("tile/").ok_or_else(bad)?;
        let (level, rest) = rest.split_once('/').ok_or_else(bad)?;
        let (digits, width) = match rest.split_once(".p/") {
            Some((digits, width)) => (digits, width.parse().map_err(|_| bad())?),
            None => (rest, WIDTH),
        };
        let mut n: u64 = 0;
        for part in digits.split('/') {
            let part = part.strip_prefix('x').unwrap_or(part);
            let part: u64 = part.parse().map_err(|_| bad())?;
            n = n.checked_mul(1000).and_then(|n| n.checked_add(part)).ok_or_else(bad)?;
        }
        if width == 0 || width > WIDTH {
            return Err(bad());
        }
        let tile = match level {
            "entries" => Self::Entries(n, width),
            level => Self::Hashes(level.parse().map_err(|_| bad())?, n, width),
        };
        let fits = !matches!(tile, Self::Hashes(level, ..) if level >= LEVELS);
        if fits && tile.path() == path { Ok(tile) } else { Err(bad()) }
    }
}

/// Appends an entry to a bundle: its length, big-endian, and its bytes. Nothing for one that is too long.
pub fn put_entry(bundle: &mut Vec<u8>, entry: &[u8]) -> Option<()> {
    let len = u16::try_from(entry.len()).ok()?;
    bundle.extend(len.to_be_bytes());
    bundle.extend(entry);
    Some(())
}

/// Splits off the first entry: itself, and what follows. Nothing where the bytes end within it.
pub fn take_entry(bundle: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bundle.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*len)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let table = [
            (Tile::Hashes(0, 0, 256), "tile/0/000"),
            (Tile::Hashes(3, 1_234_067, 256), "tile/3/x001/x234/067"),
            (Tile::Hashes(1, 999, 1), "tile/1/999.p/1"),
            (Tile::Entries(1_000, 112), "tile/entries/x001/000.p/112"),
        ];
        for (tile, path) in table {
            assert_eq!(tile.path(), path);
            assert_eq!(Tile::parse(path).unwrap(), tile);
        }
        let bad = ["tile/0/0", "tile/0/000.p/256", "tile/0/000.p/0", "tile/0/x000/001", "tile/7/000", "tile/00/000"];
        for path in bad.into_iter().chain(["tile/0/001/000", "tile/entries/", "tile/0/x18446744073709551/000", "x"]) {
            assert!(Tile::parse(path).is_err(), "{path}");
        }
    }

    #[test]
    fn bundles() {
        let mut bundle = Vec::new();
        put_entry(&mut bundle, b"one").unwrap();
        put_entry(&mut bundle, b"").unwrap();
        assert_eq!(take_entry(&bundle), Some((b"one".as_slice(), b"\0\0".as_slice())));
        assert_eq!(take_entry(&bundle[..4]), None);
        assert!(put_entry(&mut bundle, &[0; ENTRY_BYTES_MAX + 1]).is_none());
    }
}
