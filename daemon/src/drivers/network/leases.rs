//! Addresses that guests have: dnsmasq's file of leases.

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The longest file that is read, bytes.
const LONGEST: u64 = 8 << 20;

/// A lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// When it ends, seconds since the epoch; 0: never.
    pub expiry: i64,
    /// Hardware address, as far as it is known.
    pub mac: Option<String>,
    /// IAID of an IPv6 lease.
    pub iaid: Option<String>,
    /// The address.
    pub address: IpAddr,
    /// The client's name.
    pub hostname: Option<String>,
    /// Client id or DUID.
    pub client_id: Option<String>,
}

/// The leases in a file that have not ended; none where there is no file.
///
/// # Errors
/// The system's.
pub fn read(path: &Path) -> io::Result<Vec<Lease>> {
    let mut text = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(LONGEST).read_to_end(&mut text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
    Ok(parse(&String::from_utf8_lossy(&text), now))
}

/// Lines `EXPIRY MAC ADDRESS NAME CLIENT-ID`; after a line `duid …` they are of IPv6 and have an
/// IAID in the second place (dnsmasq's lease.c writes them so; lines that are cut short are left
/// out).
fn parse(text: &str, now: i64) -> Vec<Lease> {
    let mut leases = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [expiry, second, address, name, client, ..] = words[..] else {
            continue;
        };
        let (Ok(expiry), Ok(address)) = (expiry.parse::<i64>(), address.parse::<IpAddr>()) else {
            continue;
        };
        if expiry != 0 && expiry <= now {
            continue;
        }
        let stated = |word: &str| (word != "*").then(|| word.to_owned());
        let v6 = address.is_ipv6();
        leases.push(Lease {
            expiry,
            mac: if v6 { mac_of_duid(client) } else { mac(second) },
            iaid: v6.then(|| second.trim_start_matches('T').to_owned()),
            address,
            hostname: stated(name),
            client_id: stated(client),
        });
    }
    leases
}

/// `06-52:54:…` where the hardware is no Ethernet.
fn mac(word: &str) -> Option<String> {
    let mac = word.rsplit('-').next().unwrap_or(word);
    (mac.len() == 17).then(|| mac.to_owned())
}

/// The hardware address in a DUID of type 1 or 3 (RFC 8415, 11), which ends with it.
fn mac_of_duid(duid: &str) -> Option<String> {
    let bytes: Vec<&str> = duid.split(':').collect();
    let kind = (bytes.first()?, bytes.get(1)?, bytes.get(2)?, bytes.get(3)?);
    match (kind, bytes.len()) {
        ((&"00", &"01", &"00", &"01"), 14) => Some(bytes[8..].join(":")),
        ((&"00", &"03", &"00", &"01"), 10) => Some(bytes[4..].join(":")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_read_and_ended_ones_left_out() {
        let text = "100 52:54:00:00:00:01 10.0.0.5 vm 01:52:54:00:00:00:01\n\
                    900 52:54:00:00:00:02 10.0.0.6 * *\n\
                    0 52:54:00:00:00:03 10.0.0.7 c *\n\
                    duid 00:01:00:01:2c\n\
                    900 5505 fd00::5 six 00:03:00:01:52:54:00:00:00:09\n\
                    900 52:54:00:00:00:04 10.0.0.";
        let leases = parse(text, 500);
        assert_eq!(leases.len(), 3, "{leases:?}");
        assert_eq!(leases[0].mac.as_deref(), Some("52:54:00:00:00:02"));
        assert_eq!(
            (
                leases[0].hostname.as_deref(),
                leases[0].client_id.as_deref()
            ),
            (None, None)
        );
        assert_eq!(leases[1].expiry, 0);
        assert_eq!(leases[2].mac.as_deref(), Some("52:54:00:00:00:09"));
        assert_eq!(leases[2].iaid.as_deref(), Some("5505"));
        assert!(read(Path::new("/nonexistent/leases")).unwrap().is_empty());
    }
}
