//! The methods: names, descriptions, parameters and results. One line here makes a method known to the
//! server, its schema, the client and `fanlight ctl`.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    VmConfig,
    display::*,
    error::{ApiError, ErrorKind, read},
    types::*,
};

/// A method.
pub trait Method {
    /// Its name.
    const NAME: &'static str;
    /// What it takes.
    type Params: Serialize + DeserializeOwned + JsonSchema;
    /// What it gives.
    type Result: Serialize + DeserializeOwned + JsonSchema;
}

/// What is known of a method.
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
    ($($(#[doc = $doc:literal])+ $name:literal $method:ident($params:ty) -> $result:ty;)*) => {
        $(
            $(#[doc = $doc])+
            #[derive(Clone, Copy, Debug)]
            pub struct $method;

            impl Method for $method {
                const NAME: &'static str = $name;
                type Params = $params;
                type Result = $result;
            }
        )*

        /// A method with its parameters.
        #[allow(clippy::large_enum_variant, reason = "one is alive at a time")]
        #[derive(Clone, Debug)]
        pub enum Call {
            $($(#[doc = $doc])+ $method($params),)*
        }

        impl Call {
            /// Reads a method's parameters.
            pub fn read(method: &str, params: Value) -> Result<Self, ApiError> {
                match method {
                    $($name => read(params).map(Self::$method),)*
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
                    $(Self::$method(_) => $name,)*
                }
            }
        }

        /// All methods.
        pub const METHODS: &[MethodInfo] = &[
            $(MethodInfo {
                name: $name,
                description: concat!($($doc),+),
                params: <$params>::json_schema,
                result: |generator| generator.subschema_for::<$result>(),
            },)*
        ];
    };
}

methods! {
    /// Who answers: versions of the program and of the API.
    "api.version" ApiVersion(NoParams) -> Version;
    /// All methods with the JSON Schema of what they take and give, as an OpenRPC document.
    "api.schema" ApiSchema(NoParams) -> Value;
    /// Opens what a machine uses of the host: takes the same JSON as `--config`.
    "vm.create" VmCreate(VmConfig) -> StateNow;
    /// Starts a created machine; it runs when the reply comes.
    "vm.boot" VmBoot(NoParams) -> StateNow;
    /// The machine in short.
    "vm.info" VmInfoMethod(NoParams) -> VmInfo;
    /// What the machine was made of, devices that were added and removed since included.
    "vm.config" VmConfigMethod(NoParams) -> VmConfig;
    /// Stops the processors and the guest's clock.
    "vm.pause" VmPause(NoParams) -> StateNow;
    /// Lets a paused machine go on; its clock goes on from where it stood.
    "vm.resume" VmResume(NoParams) -> StateNow;
    /// Presses the power button: a guest that listens shuts down.
    "vm.power_button" VmPowerButton(NoParams) -> Done;
    /// Raises a non-maskable interrupt at each processor: a guest that hangs can tell where, if it is set up to
    /// (Linux: `unknown_nmi_panic`).
    "vm.nmi" VmNmi(NoParams) -> Done;
    /// Restarts the machine at once, without asking the guest.
    "vm.reset" VmReset(NoParams) -> StateNow;
    /// Ends the machine at once, without asking the guest.
    "vm.stop" VmStop(NoParams) -> StateNow;
    /// Answers when the machine has ended.
    "vm.wait" VmWait(NoParams) -> Ended;
    /// Counters of vCPUs, devices' queues and memory.
    "vm.stats" VmStatsMethod(NoParams) -> VmStats;
    /// Devices with their PCI addresses, BARs and feature bits.
    "device.list" DeviceListMethod(NoParams) -> DeviceList;
    /// Puts a device into a free slot of the running machine.
    "device.add" DeviceAdd(AddDevice) -> Added;
    /// Asks the guest to give up a device that is behind a root port. The event `device_removed` tells when it has.
    "device.remove" DeviceRemove(DeviceId) -> Done;
    /// Makes a disk larger and tells the guest.
    "disk.resize" DiskResize(ResizeDisk) -> DiskSize;
    /// A stream socket to a console whose backend is `null` or `socket`, as a descriptor.
    "console.attach" ConsoleAttach(AttachConsole) -> Attached;
    /// All outputs of a GPU.
    "gpu.outputs" GpuOutputs(GpuIndex) -> Outputs;
    /// Plugs an output in, resizes it or pulls it. The guest is told.
    "gpu.set_output" GpuSetOutput(SetOutput) -> Outputs;
    /// A PNG file of what an output shows, at a path or as a descriptor.
    "gpu.screenshot" GpuScreenshot(Screenshot) -> ScreenshotTaken;
    /// A dma-buf of what an output shows, as a descriptor: the memory itself, not a copy.
    "gpu.export_scanout" GpuExportScanout(OutputIndex) -> ExportedPicture;
    /// A dma-buf of a resource of the guest's, as a descriptor.
    "gpu.export_resource" GpuExportResource(ResourceId) -> ExportedMemory;
    /// Starts a stream of what the display does, on a socket of its own that comes as a descriptor.
    "display.subscribe" DisplaySubscribe(WatchDisplay) -> DisplayStream;
    /// Changes what is logged to standard error.
    "log.set_level" LogSetLevel(LogLevel) -> Done;
    /// Sends events to this connection from now on, as notifications with method `event`.
    "events.subscribe" EventsSubscribe(Subscribe) -> Subscribed;
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
