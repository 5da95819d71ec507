//! The server's side: answers calls that need no machine, has displays answer theirs, and queues the rest.

use std::{os::fd::OwnedFd, sync::mpsc::Sender, thread};

use fanlight_api::{
    methods::{self, DisplayCall, MachineCall, Method, StatusCall},
    server::{Handler, Reply},
    socket::Descriptors,
    types::{Done, VmState},
};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    control::{errors, status::VmStatus},
    display::api::{CallError, Display},
};

/// Changes what is logged. The error is text for people.
pub type SetLog = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// A call that the main thread answers.
#[derive(Debug)]
pub struct Command {
    /// The method with its parameters.
    pub call: MachineCall,
    /// The descriptors that came with it.
    pub descriptors: Descriptors,
    /// Its answer.
    pub reply: Reply,
}

/// Answers the calls that the server takes, on the server's thread.
pub struct RequestHandler {
    /// Where calls for the main thread go.
    pub commands: Sender<Command>,
    /// Wakes the main thread.
    pub wake: EventFd,
    /// The machine's status.
    pub status: VmStatus,
    /// What `log.set_level` calls.
    pub set_log: SetLog,
}

impl Handler for RequestHandler {
    fn status(&self, call: StatusCall, reply: Reply) {
        match call {
            StatusCall::VmInfo(_) => reply.send::<methods::VmInfo>(Ok(self.status.info())),
            StatusCall::VmConfig(_) => {
                let none = || errors::no_machine("vm.config");
                reply.send::<methods::VmConfig>(self.status.config().ok_or_else(none));
            }
            StatusCall::LogSetLevel(params) => {
                let result = (self.set_log)(&params.level).map_err(errors::log_level);
                reply.send::<methods::LogSetLevel>(result.map(|()| Done {}));
            }
        }
    }

    fn display(&self, call: DisplayCall, reply: Reply) {
        let method = call.name();
        let gpu = gpu(&call);
        let (state, displays) = self.status.displays();
        let Some(display) = displays.get(gpu as usize) else {
            return reply.refuse(errors::no_gpu(gpu, displays.len()));
        };
        if !matches!(state, VmState::Running | VmState::Paused) {
            return reply.refuse(errors::display_state(method, state));
        }
        let counted = match display.begin_call() {
            Ok(counted) => counted,
            Err(error) => return reply.refuse(errors::display(&error)),
        };
        let display = display.clone();
        // If no thread can be started, the reply says so as it is dropped.
        let _ = thread::Builder::new()
            .name("display-call".into())
            .spawn(move || {
                answer(call, &display, reply);
                drop(counted);
            });
    }

    fn machine(&self, call: MachineCall, descriptors: Descriptors, reply: Reply) {
        let command = Command {
            call,
            descriptors,
            reply,
        };
        // If the main thread is gone, the reply says so as it is dropped.
        if self.commands.send(command).is_ok()
            && let Err(error) = self.wake.write(1)
        {
            tracing::error!(%error, "cannot wake the main loop");
        }
    }
}

/// The number of the GPU that a call is for.
fn gpu(call: &DisplayCall) -> u32 {
    match call {
        DisplayCall::GpuOutputs(params) => params.gpu,
        DisplayCall::GpuSetOutput(params) => params.gpu,
        DisplayCall::GpuScreenshot(params) => params.gpu,
        DisplayCall::GpuExportScanout(params) => params.gpu,
        DisplayCall::GpuExportResource(params) => params.gpu,
        DisplayCall::DisplaySubscribe(params) => params.gpu,
    }
}

/// Answers a call of a display, on a thread of its own.
fn answer(call: DisplayCall, display: &Display, reply: Reply) {
    match call {
        DisplayCall::GpuOutputs(_) => reply.send::<methods::GpuOutputs>(Ok(display.outputs())),
        DisplayCall::GpuSetOutput(params) => {
            let outputs = display.set_output(&params);
            reply.send::<methods::GpuSetOutput>(outputs.map_err(|error| errors::display(&error)));
        }
        DisplayCall::GpuScreenshot(params) => {
            send_with::<methods::GpuScreenshot>(reply, display.screenshot(&params));
        }
        DisplayCall::GpuExportScanout(params) => {
            let exported = display.export_scanout(params.output);
            send_with::<methods::GpuExportScanout>(reply, exported.map(with_fd));
        }
        DisplayCall::GpuExportResource(params) => {
            let exported = display.export_resource(params.resource);
            send_with::<methods::GpuExportResource>(reply, exported.map(with_fd));
        }
        DisplayCall::DisplaySubscribe(params) => {
            let stream = display.subscribe(&params);
            send_with::<methods::DisplaySubscribe>(reply, stream.map(with_fd));
        }
    }
}

fn with_fd<T>((result, fd): (T, OwnedFd)) -> (T, Option<OwnedFd>) {
    (result, Some(fd))
}

/// Sends a result with its descriptor, if it has one.
fn send_with<M: Method>(reply: Reply, result: Result<(M::Result, Option<OwnedFd>), CallError>) {
    match result {
        Ok((result, fd)) => reply.send_with::<M>(Ok(result), fd.into_iter().collect()),
        Err(error) => reply.refuse(errors::display(&error)),
    }
}
