//! The graphics of a machine.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    size::ByteSize,
    spec::{self, SpecError},
};

/// The virtio GPU with its outputs and input devices.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct GpuConfig {
    /// The outputs that are plugged in at first.
    #[schemars(with = "String")]
    pub outputs: Outputs,
    /// What outputs call themselves: 1 to 13 printable ASCII characters.
    pub edid_name: String,
    /// How much of the host's memory the guest's driver may have for its resources. What lies in the
    /// guest's own RAM does not count, but for the lists that describe it.
    pub max_resource_memory: ByteSize,
    /// What draws in 3D for the guest.
    pub renderer: Renderer,
    /// How large a window the guest sees the renderer's memory through: a power of two.
    pub hostmem: ByteSize,
    /// Gives each piece of the renderer's memory a memory slot of its own: slower, to compare.
    pub hostmem_slots: bool,
    /// PCIe root port to place the device behind; on the root bus if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u8>,
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self {
            outputs: Outputs(vec![OutputMode {
                width: 1280,
                height: 800,
            }]),
            edid_name: "Fanlight".into(),
            max_resource_memory: ByteSize(256 << 20),
            renderer: Renderer::None,
            hostmem: ByteSize(256 << 20),
            hostmem_slots: false,
            port: None,
        }
    }
}

impl FromStr for GpuConfig {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        spec::parse(text, Some("outputs"))
    }
}

/// What draws in 3D, by virglrenderer.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
pub enum Renderer {
    /// Nothing: the guest draws by itself, or on another device.
    #[default]
    #[serde(rename = "none")]
    None,
    /// OpenGL.
    #[serde(rename = "virgl")]
    Virgl,
    /// Vulkan.
    #[serde(rename = "venus")]
    Venus,
    /// Both.
    #[serde(rename = "venus+virgl")]
    VenusAndVirgl,
}

impl Renderer {
    /// Whether OpenGL is there.
    pub fn has_virgl(self) -> bool {
        matches!(self, Self::Virgl | Self::VenusAndVirgl)
    }

    /// Whether Vulkan is there.
    pub fn has_venus(self) -> bool {
        matches!(self, Self::Venus | Self::VenusAndVirgl)
    }
}

/// Size of an output in pixels: `1920x1080`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputMode {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

/// Not a size of an output.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a size of an output: write width and height in pixels, such as 1920x1080")]
pub struct OutputModeError(String);

impl FromStr for OutputMode {
    type Err = OutputModeError;

    fn from_str(text: &str) -> Result<Self, OutputModeError> {
        let error = || OutputModeError(text.into());
        let number = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            digits
                .then(|| text.parse().ok())
                .flatten()
                .ok_or_else(error)
        };
        let (width, height) = text.split_once('x').ok_or_else(error)?;
        Ok(Self {
            width: number(width)?,
            height: number(height)?,
        })
    }
}

impl fmt::Display for OutputMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// Outputs in order: `1920x1080+2560x1440`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Outputs(pub Vec<OutputMode>);

impl TryFrom<String> for Outputs {
    type Error = OutputModeError;
    fn try_from(text: String) -> Result<Self, OutputModeError> {
        text.split('+')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl From<Outputs> for String {
    fn from(outputs: Outputs) -> Self {
        let modes: Vec<_> = outputs.0.iter().map(OutputMode::to_string).collect();
        modes.join("+")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_written_as_they_are_read() {
        let gpu: GpuConfig = "1920x1080+640x480,max-resource-memory=1G,port=2"
            .parse()
            .unwrap();
        assert_eq!(String::from(gpu.outputs.clone()), "1920x1080+640x480");
        assert_eq!(gpu.max_resource_memory.0, 1 << 30);
        let json = serde_json::to_string(&gpu).unwrap();
        assert!(json.contains(r#""edid-name":"Fanlight""#), "{json}");
        assert_eq!(serde_json::from_str::<GpuConfig>(&json).unwrap(), gpu);
        assert_eq!("".parse(), Ok(GpuConfig::default()));
        let gpu: GpuConfig = "800x600,renderer=venus+virgl,hostmem=1G".parse().unwrap();
        assert_eq!(gpu.renderer, Renderer::VenusAndVirgl);
        assert_eq!(gpu.hostmem.0, 1 << 30);
    }

    #[test]
    fn mistakes_are_named() {
        for bad in [
            "",
            "x",
            "1x",
            "1x2x3",
            "+1x2",
            "-1x2",
            "1 x2",
            "99999999999x1",
        ] {
            let outputs = Outputs::try_from(bad.to_owned());
            assert!(
                outputs.unwrap_err().to_string().contains("1920x1080"),
                "{bad}"
            );
        }
        assert!("renderer=gl".parse::<GpuConfig>().is_err());
        assert!("colour=red".parse::<GpuConfig>().is_err());
    }
}
