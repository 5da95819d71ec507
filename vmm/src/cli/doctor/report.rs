//! Results of checks, and the report as text and as JSON.

use serde::Serialize;

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Ready.
    Yes,
    /// Works, with restrictions.
    Warn,
    /// Prevents the guest's use of the device.
    No,
    /// The check could not run.
    Unknown,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was checked.
    pub name: &'static str,
    /// The result.
    pub verdict: Verdict,
    /// What the check found.
    pub found: String,
    /// How to fix it, where there is a fix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// All checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether no check failed.
    pub ready: bool,
    /// In the order in which problems should be fixed.
    pub checks: Vec<Check>,
}

impl Check {
    /// A check without a fix.
    pub fn new(name: &'static str, verdict: Verdict, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict,
            found: found.into(),
            fix: None,
        }
    }

    /// The check with a fix.
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

impl Report {
    /// The report on these checks.
    pub fn new(checks: Vec<Check>) -> Self {
        Self {
            ready: checks.iter().all(|check| check.verdict != Verdict::No),
            checks,
        }
    }

    /// One line for each check, and a second one for its fix.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for check in &self.checks {
            let mark = match check.verdict {
                Verdict::Yes => "yes",
                Verdict::Warn => "warn",
                Verdict::No => "NO",
                Verdict::Unknown => "?",
            };
            text += &format!("{mark:4}  {}: {}\n", check.name, check.found);
            if let Some(fix) = &check.fix {
                text += &format!("      fix: {fix}\n");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_fixes_as_text_and_as_json() {
        let report = Report::new(vec![
            Check::new("KVM", Verdict::Yes, "works"),
            Check::new("driver", Verdict::No, "none").fix("fanlight vfio bind 0000:03:00.1"),
        ]);
        assert_eq!(
            report.to_text(),
            "yes   KVM: works\nNO    driver: none\n      fix: fanlight vfio bind 0000:03:00.1\n"
        );
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["ready"], false);
        assert_eq!(json["checks"][1]["verdict"], "no");
        assert_eq!(json["checks"][1]["fix"], "fanlight vfio bind 0000:03:00.1");
        assert_eq!(json["checks"][0].get("fix"), None);
    }
}
