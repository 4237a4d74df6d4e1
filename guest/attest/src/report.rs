//! Attestation reports of AMD SEV-SNP (SEV Secure Nested Paging Firmware ABI Specification, 56860, "ATTESTATION_REPORT"),
//! as far as the protocol looks into them, and the simulated report (contract §6.3).

use std::ops::Range;

/// Length of a report in bytes.
pub const LEN: usize = 1184;
/// Length of what the guest has put into a report.
pub const DATA_LEN: usize = 64;

const DATA: Range<usize> = 0x50..0x50 + DATA_LEN;
const MEASUREMENT: Range<usize> = 0x90..0xc0;
const CHIP_ID: Range<usize> = 0x1a0..0x1e0;

/// A report, real or simulated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report(pub [u8; LEN]);

/// Who a report says that this guest is: what its keys for sealing are made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Of the guest's initial memory.
    pub measurement: [u8; 48],
    /// Of the processor.
    pub chip_id: [u8; 64],
}

impl Report {
    /// The simulated report: constants that anybody can write down.
    pub fn simulated(data: &[u8; DATA_LEN]) -> Self {
        const VERSION: u32 = 0xa3;
        const GUEST_SVN: u32 = 1;
        /// Offsets and values of the current TCB.
        const TCB: [(usize, u8); 4] = [(0x38, 3), (0x39, 0), (0x3e, 8), (0x3f, 115)];
        let mut report = [0; LEN];
        report[..4].copy_from_slice(&VERSION.to_le_bytes());
        report[4..8].copy_from_slice(&GUEST_SVN.to_le_bytes());
        for (at, value) in TCB {
            report[at] = value;
        }
        report[DATA].copy_from_slice(data);
        for (index, byte) in report[MEASUREMENT].iter_mut().enumerate() {
            *byte = (index as u8).wrapping_mul(0xa3);
        }
        report[CHIP_ID].fill(0xa3);
        Report(report)
    }

    /// What the guest has put into it.
    pub fn data(&self) -> &[u8] {
        &self.0[DATA]
    }

    /// Who it says that the guest is.
    pub fn identity(&self) -> Identity {
        let mut identity = Identity { measurement: [0; 48], chip_id: [0; 64] };
        identity.measurement.copy_from_slice(&self.0[MEASUREMENT]);
        identity.chip_id.copy_from_slice(&self.0[CHIP_ID]);
        identity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Contract §6.3.
    #[test]
    fn the_simulated_report_has_the_contracts_bytes() {
        let Report(report) = Report::simulated(&[7; DATA_LEN]);
        let mut expected = vec![0u8; 1184];
        expected[0] = 0xa3;
        expected[4] = 1;
        expected[0x38] = 3;
        expected[0x3e] = 8;
        expected[0x3f] = 115;
        expected[0x50..0x90].fill(7);
        for index in 0..48 {
            expected[0x90 + index] = (index * 0xa3 % 256) as u8;
        }
        expected[0x1a0..0x1e0].fill(0xa3);
        assert_eq!(report[..], expected[..]);
    }
}
