//! The TLS certificate whose extensions carry a report, and the report's half of the bond between the two (contract
//! §6.2).

use rcgen::{
    CertificateParams, CustomExtension, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P384_SHA384,
    PublicKeyData,
};
use ring::digest;
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::NoServerSessionStorage;

use crate::report::{DATA_LEN, Report};

/// Extension with the report.
const REPORT_OID: &[u64] = &[1, 3, 6, 1, 4, 1, 58270, 1, 1];
/// Extension with the certificates that sign it.
const CHAIN_OID: &[u64] = &[1, 3, 6, 1, 4, 1, 58270, 1, 2];

/// A report with what it takes to judge it.
#[derive(Debug)]
pub struct Evidence {
    /// The report.
    pub report: Report,
    /// The certificates that sign it, as JSON.
    pub chain: Vec<u8>,
}

impl Evidence {
    /// The simulated report, which nobody has signed.
    pub fn simulated(data: &[u8; DATA_LEN]) -> Self {
        Evidence { report: Report::simulated(data), chain: b"{}".to_vec() }
    }
}

/// The key of the certificate, P-384 and new.
#[derive(Debug)]
pub struct Key(KeyPair);

impl Key {
    /// A new one.
    ///
    /// # Errors
    /// If the kernel gives no random numbers.
    pub fn new() -> Result<Self, String> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384);
        Ok(Key(key.map_err(|e| format!("generate a key: {e}"))?))
    }

    /// What the report is to say of it: the hash of the public key, and behind it what the box is bound to, if to
    /// anything.
    pub fn report_data(&self, binding: Option<[u8; 32]>) -> [u8; DATA_LEN] {
        let hash = digest::digest(&digest::SHA256, &self.0.subject_public_key_info());
        let mut data = [0; DATA_LEN];
        data[..32].copy_from_slice(hash.as_ref());
        data[32..].copy_from_slice(&binding.unwrap_or_default());
        data
    }
}

/// TLS with a certificate for this key that carries the evidence.
///
/// # Errors
/// If the certificate cannot be made.
pub fn server_config(key: &Key, evidence: Evidence) -> Result<ServerConfig, String> {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, "A3S Box RA-TLS");
    name.push(DnType::OrganizationName, "A3S Lab");
    let mut params = CertificateParams::default();
    params.distinguished_name = name;
    // The bytes themselves are the extensions' values, with no DER around them.
    params.custom_extensions = vec![
        CustomExtension::from_oid_content(REPORT_OID, evidence.report.0.to_vec()),
        CustomExtension::from_oid_content(CHAIN_OID, evidence.chain),
    ];
    let certificate =
        params.self_signed(&key.0).map_err(|e| format!("make the certificate: {e}"))?;
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.0.serialize_der()));
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)
        .map_err(|e| format!("set TLS up: {e}"))?;
    // A connection has one request, and nobody resumes: nothing is kept of it.
    config.session_storage = std::sync::Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}
