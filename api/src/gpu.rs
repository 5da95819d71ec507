//! The configuration of a virtio GPU.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    size::ByteSize,
    spec::{self, SpecError},
};

/// A virtio GPU with its outputs.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct GpuConfig {
    /// Outputs connected at start, and their sizes in pixels, at most 16.
    #[schemars(with = "String")]
    pub outputs: Outputs,
    /// Monitor name in the EDID, 1 to 13 printable ASCII characters.
    pub edid_name: String,
    /// Limit of host memory for resources of the guest driver. Resources in guest RAM count only with the lists
    /// that describe them.
    pub max_resource_memory: ByteSize,
    /// 3D APIs that virglrenderer offers the guest.
    pub renderer: Renderer,
    /// Size of the BAR that maps renderer memory into the guest, a power of two.
    pub hostmem: ByteSize,
    /// Whether each blob of renderer memory gets its own KVM memory slot. Slower; for comparison.
    pub hostmem_slots: bool,
    /// Number of the PCIe root port to plug the device into, from 1 on: the root bus if absent.
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

/// 3D APIs that virglrenderer offers the guest.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
pub enum Renderer {
    /// No 3D. The guest draws in software, or on another device.
    #[default]
    #[serde(rename = "none")]
    None,
    /// OpenGL (virgl).
    #[serde(rename = "virgl")]
    Virgl,
    /// Vulkan (Venus).
    #[serde(rename = "venus")]
    Venus,
    /// OpenGL and Vulkan.
    #[serde(rename = "venus+virgl")]
    VenusAndVirgl,
}

impl Renderer {
    /// Whether the guest has OpenGL.
    pub fn has_virgl(self) -> bool {
        matches!(self, Self::Virgl | Self::VenusAndVirgl)
    }

    /// Whether the guest has Vulkan.
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

/// Not an output size.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not an output size: give width and height in pixels, such as 1920x1080")]
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
