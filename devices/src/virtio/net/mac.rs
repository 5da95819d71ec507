//! MAC addresses.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

/// Not a unicast MAC address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "{0:?} is not a hardware address for a guest: write six bytes such as 52:54:00:12:34:56, the first even"
)]
pub struct MacError(String);

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let bytes: Vec<u8> = text
            .split(':')
            .map(|part| {
                let digits = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
                digits.then(|| u8::from_str_radix(part, 16).ok())?
            })
            .collect::<Option<_>>()
            .ok_or_else(|| MacError(text.into()))?;
        match <[u8; 6]>::try_from(bytes) {
            // An odd first byte is a multicast address.
            Ok(mac) if mac[0] & 1 == 0 && mac != [0; 6] => Ok(Self(mac)),
            _ => Err(MacError(text.into())),
        }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Mac {
    /// A locally administered address derived from a name (FNV-1a hash): the same name gives the same address.
    pub fn for_name(name: &str) -> Self {
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let [a, b, c, d, ..] = hash.to_le_bytes();
        Self([0x02, 0xfa, a, b, c, d])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_parse_and_groups_are_refused() {
        let mac: Mac = "52:54:00:12:34:56".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:12:34:56");
        for bad in [
            "",
            "52:54:00:12:34",
            "53:54:00:12:34:56",
            "52:54:00:12:34:5g",
            "52:54:00:12:34:56:78",
            "00:00:00:00:00:00",
            "+2:54:00:12:34:56",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_give_stable_distinct_addresses() {
        assert_eq!(Mac::for_name("tap0"), Mac::for_name("tap0"));
        assert_ne!(Mac::for_name("tap0"), Mac::for_name("tap1"));
        assert!(Mac::for_name("tap0").to_string().parse::<Mac>().is_ok());
    }
}
