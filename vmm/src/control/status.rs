//! What calls can learn of the machine in every state.

use std::sync::{Arc, MutexGuard};

use fanlight_api::{
    VmConfig,
    types::{VmEnding, VmInfo, VmState},
};
use fanlight_devices::sync::Mutex;

use crate::display::api::Display;

/// State, configuration and displays of the machine. The main thread writes them; the server's thread reads them.
#[derive(Clone, Debug, Default)]
pub struct VmStatus(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    info: VmInfo,
    config: Option<VmConfig>,
    displays: Vec<Display>,
}

impl VmStatus {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock()
    }

    /// The machine in short.
    pub fn info(&self) -> VmInfo {
        self.inner().info.clone()
    }

    /// The machine's configuration, once one was created.
    pub fn config(&self) -> Option<VmConfig> {
        self.inner().config.clone()
    }

    /// Where the machine is in its life.
    pub fn state(&self) -> VmState {
        self.inner().info.state
    }

    /// The displays of its GPUs, by number, and the state of the machine at the same moment.
    pub fn displays(&self) -> (VmState, Vec<Display>) {
        let inner = self.inner();
        (inner.info.state, inner.displays.clone())
    }

    /// A machine was created.
    pub fn set_created(&self, config: &VmConfig, displays: Vec<Display>) {
        *self.inner() = Inner {
            info: VmInfo {
                state: VmState::Created,
                ending: None,
                cpus: Some(config.cpus),
                memory: Some(config.memory.size.0),
                resets: 0,
            },
            config: Some(config.clone()),
            displays,
        };
    }

    /// The state changed.
    pub fn set_state(&self, state: VmState) {
        self.inner().info.state = state;
    }

    /// The configuration changed.
    pub fn set_config(&self, config: &VmConfig) {
        self.inner().config = Some(config.clone());
    }

    /// The guest restarts.
    pub fn count_reset(&self) {
        self.inner().info.resets += 1;
    }

    /// The machine ended.
    pub fn set_ended(&self, ending: VmEnding) {
        let mut inner = self.inner();
        inner.info.state = VmState::Stopped;
        inner.info.ending = Some(ending);
    }
}
