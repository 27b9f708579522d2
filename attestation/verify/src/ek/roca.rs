//! The fingerprint of RSA keys made by the flawed library of CVE-2017-15361 ("ROCA": Nemec, Sys, Svenda, Klinec, Matyas,
//! "The Return of Coppersmith's Attack", CCS 2017, section 3).
//!
//! Its primes are `k * M + (65537^a mod M)` with M a product of the first primes. So the modulus, a product of two of
//! them, is a power of 65537 modulo each prime r that divides M. M holds the primes up to 167 for the smallest keys and
//! more for larger ones; those up to 167 are in each.

/// Odd primes up to 167.
const PRIMES: [u16; 38] = [
    3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109,
    113, 127, 131, 137, 139, 149, 151, 157, 163, 167,
];

/// Whether `modulus` (big-endian) carries the fingerprint. An honest modulus does with a probability of about 2^-28.
pub(crate) fn is_fingerprinted(modulus: &[u8]) -> bool {
    PRIMES.iter().all(|prime| is_power_of_65537(remainder(modulus, *prime), *prime))
}

fn remainder(number: &[u8], prime: u16) -> u16 {
    let folded = number.iter().fold(0, |r, byte| modulo(r, 256, u32::from(*byte), prime));
    u16::try_from(folded).unwrap_or(u16::MAX)
}

/// `(a * b + c) mod prime`, for a below the prime and b below 2^17: no intermediate value leaves 32 bits.
fn modulo(a: u32, b: u32, c: u32, prime: u16) -> u32 {
    a.wrapping_mul(b).wrapping_add(c).checked_rem(u32::from(prime)).unwrap_or_default()
}

/// Walks the powers until they repeat, at most as many as the prime has residues. Zero is no power of anything.
fn is_power_of_65537(residue: u16, prime: u16) -> bool {
    let mut power = 1;
    for _ in 0..prime {
        if power == u32::from(residue) {
            return true;
        }
        power = modulo(power, 65537, 0, prime);
        if power == 1 {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testdata::number::{add, bytes, flawed, multiply, random};

    #[test]
    fn moduli_of_the_flawed_form_are_found() {
        // M as for keys of 512, 1024, 2048 and 3072 bits or more: primes up to 167, 353 and 701.
        for (primes_to, limbs) in [(167, 1), (353, 2), (701, 2)] {
            for a in 0..8 {
                let (p, q) = (flawed(primes_to, a, limbs), flawed(primes_to, 7 - a, limbs));
                let modulus = bytes(&multiply(&p, &q));
                assert!(is_fingerprinted(&modulus), "primes up to {primes_to}, exponents {a} and {}", 7 - a);
                // One off, and it is no such number any more.
                assert!(!is_fingerprinted(&bytes(&add(&multiply(&p, &q), &[2]))));
            }
        }
    }

    #[test]
    fn honest_moduli_are_not() {
        let mut seen = [0usize; 38];
        const TRIES: usize = 20_000;
        for n in 0..TRIES {
            let mut modulus = bytes(&random(64 + 32 * (n % 2)));
            modulus[0] |= 0x80;
            *modulus.last_mut().unwrap() |= 1;
            assert!(!is_fingerprinted(&modulus), "{}", hex::encode(&modulus));
            for (count, prime) in seen.iter_mut().zip(PRIMES) {
                *count += usize::from(is_power_of_65537(remainder(&modulus, prime), prime));
            }
        }
        // Each prime alone passes as many as its share of powers: so the test above is not vacuous, and their product,
        // the rate of false alarms, is below 2^-25.
        let mut rate = 1f64;
        for (count, prime) in seen.iter().zip(PRIMES) {
            let powers = (0..prime).filter(|r| is_power_of_65537(*r, prime)).count();
            let expected = powers as f64 / f64::from(prime);
            let found = *count as f64 / TRIES as f64;
            assert!((found - expected).abs() < 0.02, "{prime}: {found} of {expected}");
            rate *= expected * f64::from(prime) / f64::from(prime - 1);
        }
        assert!(rate < 2f64.powi(-25), "2^{}", rate.log2());
    }

    #[test]
    fn remainders_are_right() {
        assert_eq!(remainder(&[0x01, 0x00, 0x01], 167), (65537 % 167) as u16);
        assert_eq!(remainder(&[0xff; 16], 163), (u128::MAX % 163) as u16);
        assert_eq!(remainder(&[], 3), 0);
    }
}
