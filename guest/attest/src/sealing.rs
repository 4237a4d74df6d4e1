//! Sealed data (contract §6.5): encrypted with a key that follows from the guest's identity. The identity is in the
//! report and so known to everybody: what is sealed is safe from accidents, not from people.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use ring::rand::{SecureRandom, SystemRandom};

use crate::report::Identity;

const SALT: &[u8] = b"a3s-sealed-storage-v1";
const KEY_LEN: usize = 32;

/// The name of the policy of requests that have none, and what unknown names mean.
pub const DEFAULT_POLICY: &str = "MeasurementAndChip";

struct KeyBytes;

impl KeyType for KeyBytes {
    fn len(&self) -> usize {
        KEY_LEN
    }
}

fn key_bytes(identity: &Identity, context: &str, policy: &str) -> Option<[u8; KEY_LEN]> {
    let Identity { measurement, chip_id } = identity;
    let from = match policy {
        "MeasurementOnly" => measurement.to_vec(),
        "ChipOnly" => chip_id.to_vec(),
        _ => [&measurement[..], &chip_id[..]].concat(),
    };
    let mut key = [0; KEY_LEN];
    let salted = Salt::new(HKDF_SHA256, SALT).extract(&from);
    salted.expand(&[context.as_bytes()], KeyBytes).ok()?.fill(&mut key).ok()?;
    Some(key)
}

fn key(identity: &Identity, context: &str, policy: &str) -> Result<LessSafeKey, String> {
    key_bytes(identity, context, policy)
        .and_then(|bytes| UnboundKey::new(&AES_256_GCM, &bytes).ok())
        .map(LessSafeKey::new)
        .ok_or_else(|| "Failed to derive the sealing key".to_owned())
}

/// Seals data in base64; the result is base64, too.
///
/// # Errors
/// A text for the client: it is not base64.
pub fn seal(
    identity: &Identity,
    data: &str,
    context: &str,
    policy: &str,
) -> Result<String, String> {
    let mut data = STANDARD.decode(data).map_err(|e| format!("Invalid base64 data: {e}"))?;
    let mut nonce = [0; NONCE_LEN];
    SystemRandom::new().fill(&mut nonce).map_err(|_| "Failed to generate nonce")?;
    let tag = key(identity, context, policy)?
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(context.as_bytes()),
            &mut data,
        )
        .map_err(|_| "Encryption failed")?;
    let blob = [&nonce[..], &data[..], tag.as_ref()].concat();
    Ok(STANDARD.encode(blob))
}

/// Opens what [`seal`] returned.
///
/// # Errors
/// A text for the client: it is not that, or of another identity, context or policy.
pub fn unseal(
    identity: &Identity,
    blob: &str,
    context: &str,
    policy: &str,
) -> Result<String, String> {
    let mut blob = STANDARD.decode(blob).map_err(|e| format!("Invalid base64 blob: {e}"))?;
    let Some((nonce, sealed)) = blob
        .split_first_chunk_mut::<NONCE_LEN>()
        .filter(|(_, sealed)| sealed.len() >= AES_256_GCM.tag_len())
    else {
        return Err("Sealed blob too short".into());
    };
    let nonce = Nonce::assume_unique_for_key(*nonce);
    let data = key(identity, context, policy)?
        .open_in_place(nonce, Aad::from(context.as_bytes()), sealed)
        .map_err(|_| "Unseal failed: TEE identity mismatch or data corrupted")?;
    Ok(STANDARD.encode(data))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{DATA_LEN, Report};

    fn identity() -> Identity {
        Report::simulated(&[0; DATA_LEN]).identity()
    }

    /// The vectors of contract §6.5.
    #[test]
    fn keys_are_the_contracts() {
        for (policy, expected) in [
            (DEFAULT_POLICY, "22f1df14961550e4f8f5fb3c06f75387aaf88b5d0906bf8ea32d662dbc2b0a26"),
            ("Unknown", "22f1df14961550e4f8f5fb3c06f75387aaf88b5d0906bf8ea32d662dbc2b0a26"),
            ("MeasurementOnly", "f362b4e5adf3adcf3311d9a8ecefc25775d21d979e6f1858bb041b2d3ad2eea1"),
            ("ChipOnly", "d37ac0a76c516a1e4ad68c14d865bd68285e599df1af492fc0c89cb3b34b07d2"),
        ] {
            let key = key_bytes(&identity(), "test-ctx", policy).expect("a key");
            let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, expected, "{policy}");
        }
    }

    #[test]
    fn only_the_same_context_policy_and_identity_open_what_was_sealed() {
        let blob = seal(&identity(), "aGVsbG8=", "c", DEFAULT_POLICY).expect("sealed");
        let open = |identity: &Identity, blob: &str, context: &str, policy: &str| {
            unseal(identity, blob, context, policy)
        };
        assert_eq!(open(&identity(), &blob, "c", DEFAULT_POLICY), Ok("aGVsbG8=".into()));
        let failed = Err("Unseal failed: TEE identity mismatch or data corrupted".to_owned());
        assert_eq!(open(&identity(), &blob, "d", DEFAULT_POLICY), failed);
        assert_eq!(open(&identity(), &blob, "c", "ChipOnly"), failed);
        let other = Identity { chip_id: [0; 64], ..identity() };
        assert_eq!(open(&other, &blob, "c", DEFAULT_POLICY), failed);
        let bytes = STANDARD.decode(&blob).expect("base64");
        assert_eq!(bytes.len(), NONCE_LEN + 5 + 16);
        for bit in 0..8 * bytes.len() {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let flipped = STANDARD.encode(flipped);
            assert_eq!(open(&identity(), &flipped, "c", DEFAULT_POLICY), failed, "bit {bit}");
        }
        let short = STANDARD.encode(&bytes[..NONCE_LEN + 15]);
        let refused = |blob: &str| open(&identity(), blob, "c", DEFAULT_POLICY);
        assert_eq!(refused(&short), Err("Sealed blob too short".into()));
        assert!(refused("%").is_err_and(|text| text.starts_with("Invalid base64 blob: ")));
        assert!(
            seal(&identity(), "%", "c", "")
                .is_err_and(|text| text.starts_with("Invalid base64 data: "))
        );
    }

    #[test]
    fn the_same_data_is_never_sealed_the_same_way() {
        let sealed = || seal(&identity(), "", "c", DEFAULT_POLICY).expect("sealed");
        assert_ne!(sealed(), sealed());
    }
}
