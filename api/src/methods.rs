//! The methods: names, descriptions, parameters and results. One line here makes a method known to the
//! server, its schema, the client and `fanlight ctl`.
//!
//! The group of a method says who answers it. Each group is its own enum, and the one place that answers it matches
//! without a wildcard. So a method without an answer does not compile.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    config,
    display::*,
    error::{ApiError, ErrorKind, read},
    types::{self, *},
};

/// A method.
pub trait Method {
    /// Its name on the wire, such as `vm.info`.
    const NAME: &'static str;
    /// Its parameters: an object.
    type Params: Serialize + DeserializeOwned + JsonSchema;
    /// Its result.
    type Result: Serialize + DeserializeOwned + JsonSchema;
}

/// The description of a method.
pub struct MethodInfo {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub description: &'static str,
    /// Schema of its parameters: an object.
    pub params: fn(&mut SchemaGenerator) -> Schema,
    /// Schema of its result.
    pub result: fn(&mut SchemaGenerator) -> Schema,
}

macro_rules! methods {
    ($(
        $(#[doc = $group_doc:literal])+ $group:ident($calls:ident) {
            $($(#[doc = $doc:literal])+ $name:literal $method:ident($params:ty) -> $result:ty;)*
        }
    )*) => {
        $($(
            $(#[doc = $doc])+
            #[derive(Clone, Copy, Debug)]
            pub struct $method;

            impl Method for $method {
                const NAME: &'static str = $name;
                type Params = $params;
                type Result = $result;
            }
        )*)*

        $(
            $(#[doc = $group_doc])+
            #[allow(clippy::large_enum_variant, reason = "one is alive at a time")]
            #[derive(Clone, Debug)]
            pub enum $calls {
                $($(#[doc = $doc])+ $method($params),)*
            }

            impl $calls {
                /// The method's name.
                pub fn name(&self) -> &'static str {
                    match self {
                        $(Self::$method(_) => $name,)*
                    }
                }
            }
        )*

        /// A method with its parameters, by who answers it.
        #[allow(clippy::large_enum_variant, reason = "one is alive at a time")]
        #[derive(Clone, Debug)]
        pub enum Call {
            $($(#[doc = $group_doc])+ $group($calls),)*
        }

        impl Call {
            /// Reads a method's parameters.
            pub fn read(method: &str, params: Value) -> Result<Self, ApiError> {
                match method {
                    $($($name => read(params).map(|params| Self::$group($calls::$method(params))),)*)*
                    _ => Err(ApiError::new(
                        ErrorKind::UnknownMethod,
                        format!("there is no method {method:?}"),
                    )
                    .with_nearest(method, METHODS.iter().map(|method| method.name))),
                }
            }

            /// The method's name.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$group(call) => call.name(),)*
                }
            }
        }

        /// All methods.
        pub const METHODS: &[MethodInfo] = &[
            $($(MethodInfo {
                name: $name,
                description: concat!($($doc),+),
                params: <$params>::json_schema,
                result: |generator| generator.subschema_for::<$result>(),
            },)*)*
        ];
    };
}

methods! {
    /// Calls that the server answers itself.
    Server(ServerCall) {
        /// Versions of the program and of the API, and the server's process id.
        "api.version" ApiVersion(NoParams) -> Version;
        /// All methods with the JSON Schema of their parameters and results, as an OpenRPC document.
        "api.schema" ApiSchema(NoParams) -> Value;
        /// Sends events to this connection from now on, as notifications with method `event`.
        "events.subscribe" EventsSubscribe(Subscribe) -> Subscribed;
    }

    /// Calls that are answered at once in every state of the machine.
    Status(StatusCall) {
        /// State, size and restarts of the machine.
        "vm.info" VmInfo(NoParams) -> types::VmInfo;
        /// The machine's configuration, with the devices that were added and removed since.
        "vm.config" VmConfig(NoParams) -> config::VmConfig;
        /// Changes what is logged to standard error.
        "log.set_level" LogSetLevel(LogLevel) -> Done;
    }

    /// Calls that the thread of the machine answers, in the order in which they come.
    Machine(MachineCall) {
        /// Opens the host's files and devices for a machine: takes the same JSON as `--config`.
        "vm.create" VmCreate(config::VmConfig) -> StateNow;
        /// Starts a created machine. The reply comes when it runs.
        "vm.boot" VmBoot(NoParams) -> StateNow;
        /// Stops the processors and the guest's clock.
        "vm.pause" VmPause(NoParams) -> StateNow;
        /// Resumes a paused machine; the guest's clock continues from where it stopped.
        "vm.resume" VmResume(NoParams) -> StateNow;
        /// Presses the power button: a guest that handles it shuts down.
        "vm.power_button" VmPowerButton(NoParams) -> Done;
        /// Raises a non-maskable interrupt at each processor. A guest that hangs can print where, if it is set up to
        /// (Linux: `unknown_nmi_panic`).
        "vm.nmi" VmNmi(NoParams) -> Done;
        /// Restarts the machine at once, without asking the guest.
        "vm.reset" VmReset(NoParams) -> StateNow;
        /// Ends the machine at once, without asking the guest.
        "vm.stop" VmStop(NoParams) -> StateNow;
        /// Answers when the machine has ended.
        "vm.wait" VmWait(NoParams) -> Ended;
        /// Counters of vCPUs, device queues and memory.
        "vm.stats" VmStats(NoParams) -> types::VmStats;
        /// Devices with their PCI addresses, BARs and feature bits.
        "device.list" DeviceList(NoParams) -> types::DeviceList;
        /// Plugs a device into a free slot of the running machine.
        "device.add" DeviceAdd(AddDevice) -> Added;
        /// Asks the guest to release a device that is behind a root port. The event `device_removed` follows when it
        /// has.
        "device.remove" DeviceRemove(DeviceId) -> Done;
        /// Grows a disk and notifies the guest.
        "disk.resize" DiskResize(ResizeDisk) -> DiskSize;
        /// A stream socket to a console whose backend is `null` or `socket`, as a descriptor.
        "console.attach" ConsoleAttach(AttachConsole) -> Attached;
    }

    /// Calls that the display of a GPU answers, each on a thread of its own: pixels take time.
    Display(DisplayCall) {
        /// All outputs of a GPU.
        "gpu.outputs" GpuOutputs(GpuIndex) -> Outputs;
        /// Connects, resizes or disconnects an output and notifies the guest.
        "gpu.set_output" GpuSetOutput(SetOutput) -> Outputs;
        /// A PNG file of what an output shows, at a path or as a descriptor.
        "gpu.screenshot" GpuScreenshot(Screenshot) -> ScreenshotTaken;
        /// A dma-buf of what an output shows, as a descriptor: the memory itself, not a copy.
        "gpu.export_scanout" GpuExportScanout(OutputIndex) -> ExportedFrame;
        /// A dma-buf of a guest resource, as a descriptor.
        "gpu.export_resource" GpuExportResource(ResourceId) -> ExportedResource;
        /// Starts a stream of display updates, on a socket of its own that comes as a descriptor.
        "display.subscribe" DisplaySubscribe(SubscribeDisplay) -> DisplayStream;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn calls_are_read_by_name() {
        let call = Call::read("device.remove", json!({"id": "disk0"})).unwrap();
        assert_eq!(call.name(), "device.remove");
        let error = Call::read("vm.resme", json!({})).unwrap_err();
        assert_eq!(error.data.suggestion.as_deref(), Some("vm.resume"));
        assert!(Call::read("vm.boot", json!({"fast": true})).is_err());
    }
}
