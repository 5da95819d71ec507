//! OpenGL ES as any program uses it: an offscreen picture, drawn by the driver that the loader finds.

#![allow(non_snake_case, reason = "the specification's names")]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

use crate::{Context, Failure, Result};

type Enum = c_uint;

macro_rules! functions {
    ($($name:ident: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        struct Functions { $($name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)* }

        impl Functions {
            fn load() -> Result<Self> {
                // SAFETY: the libraries' constructors do nothing beyond their own data.
                let library = unsafe { libloading::Library::new("libEGL.so.1") };
                let library = Box::leak(Box::new(library.context("no libEGL.so.1")?));
                type GetProcAddress = unsafe extern "C" fn(*const c_char) -> *const c_void;
                // SAFETY: EGL has a function of this type and name.
                let find = unsafe { library.get::<GetProcAddress>(b"eglGetProcAddress\0") };
                let find = find.context("libEGL.so.1 is another library")?;
                Ok(Self {
                    $($name: {
                        // SAFETY: the name ends with a NUL.
                        let at = unsafe { find(concat!(stringify!($name), "\0").as_ptr().cast()) };
                        if at.is_null() {
                            return Err(Failure(concat!("no ", stringify!($name)).into()));
                        }
                        // SAFETY: the specification has the function with this type.
                        unsafe {
                            std::mem::transmute::<
                                *const c_void,
                                unsafe extern "C" fn($($argument),*) $(-> $result)?,
                            >(at)
                        }
                    },)*
                })
            }
        }
    };
}

functions! {
    eglGetPlatformDisplay: fn(Enum, *const c_void, *const isize) -> *mut c_void;
    eglInitialize: fn(*mut c_void, *mut c_int, *mut c_int) -> c_uint;
    eglBindAPI: fn(Enum) -> c_uint;
    eglChooseConfig: fn(*mut c_void, *const c_int, *mut *mut c_void, c_int, *mut c_int) -> c_uint;
    eglCreateContext: fn(*mut c_void, *mut c_void, *mut c_void, *const c_int) -> *mut c_void;
    eglMakeCurrent: fn(*mut c_void, *mut c_void, *mut c_void, *mut c_void) -> c_uint;
    glGetString: fn(Enum) -> *const c_char;
    glGenTextures: fn(c_int, *mut c_uint);
    glBindTexture: fn(Enum, c_uint);
    glTexImage2D: fn(Enum, c_int, c_int, c_int, c_int, c_int, Enum, Enum, *const c_void);
    glGenFramebuffers: fn(c_int, *mut c_uint);
    glBindFramebuffer: fn(Enum, c_uint);
    glFramebufferTexture2D: fn(Enum, Enum, Enum, c_uint, c_int);
    glCheckFramebufferStatus: fn(Enum) -> Enum;
    glViewport: fn(c_int, c_int, c_int, c_int);
    glClearColor: fn(f32, f32, f32, f32);
    glClear: fn(Enum);
    glCreateShader: fn(Enum) -> c_uint;
    glShaderSource: fn(c_uint, c_int, *const *const c_char, *const c_int);
    glCompileShader: fn(c_uint);
    glCreateProgram: fn() -> c_uint;
    glAttachShader: fn(c_uint, c_uint);
    glBindAttribLocation: fn(c_uint, c_uint, *const c_char);
    glLinkProgram: fn(c_uint);
    glGetProgramiv: fn(c_uint, Enum, *mut c_int);
    glUseProgram: fn(c_uint);
    glVertexAttribPointer: fn(c_uint, c_int, Enum, u8, c_int, *const c_void);
    glEnableVertexAttribArray: fn(c_uint);
    glDrawArrays: fn(Enum, c_int, c_int);
    glReadPixels: fn(c_int, c_int, c_int, c_int, Enum, Enum, *mut c_void);
    glGetError: fn() -> Enum;
}

const EGL_PLATFORM_SURFACELESS_MESA: Enum = 0x31dd;
const EGL_OPENGL_ES_API: Enum = 0x30a0;
const EGL_SURFACE_TYPE: c_int = 0x3033;
const EGL_RENDERABLE_TYPE: c_int = 0x3040;
const EGL_OPENGL_ES2_BIT: c_int = 4;
const EGL_NONE: c_int = 0x3038;
const EGL_CONTEXT_CLIENT_VERSION: c_int = 0x3098;
const GL_RENDERER: Enum = 0x1f01;
const GL_TEXTURE_2D: Enum = 0x0de1;
const GL_RGBA: Enum = 0x1908;
const GL_UNSIGNED_BYTE: Enum = 0x1401;
const GL_FLOAT: Enum = 0x1406;
const GL_FRAMEBUFFER: Enum = 0x8d40;
const GL_COLOR_ATTACHMENT0: Enum = 0x8ce0;
const GL_FRAMEBUFFER_COMPLETE: Enum = 0x8cd5;
const GL_COLOR_BUFFER_BIT: Enum = 0x4000;
const GL_VERTEX_SHADER: Enum = 0x8b31;
const GL_FRAGMENT_SHADER: Enum = 0x8b30;
const GL_LINK_STATUS: Enum = 0x8b82;
const GL_TRIANGLE_STRIP: Enum = 5;

const SIZE: c_int = 64;
const VERTEX: &CStr = c"attribute vec2 p; void main() { gl_Position = vec4(p, 0.0, 1.0); }";
const FRAGMENT: &CStr =
    c"precision mediump float; void main() { gl_FragColor = vec4(1.0, 0.0, 0.0, 1.0); }";

fn done(what: &str, ok: bool) -> Result<()> {
    if ok {
        Ok(())
    } else {
        Err(Failure(format!("cannot {what}")))
    }
}

/// Draws red over the left half of a blue picture, and checks every pixel. Returns the renderer's name.
pub fn draw() -> Result<String> {
    let gl = Functions::load()?;
    // SAFETY: calls follow the specification; pointers are valid during each call.
    unsafe {
        use std::ptr::{null, null_mut};
        let display = (gl.eglGetPlatformDisplay)(EGL_PLATFORM_SURFACELESS_MESA, null(), null());
        let (mut major, mut minor) = (0, 0);
        let started = (gl.eglInitialize)(display, &mut major, &mut minor);
        done("start EGL", started != 0)?;
        (gl.eglBindAPI)(EGL_OPENGL_ES_API);
        let wanted = [
            EGL_SURFACE_TYPE,
            0,
            EGL_RENDERABLE_TYPE,
            EGL_OPENGL_ES2_BIT,
            EGL_NONE,
        ];
        let (mut config, mut count) = (null_mut(), 0);
        (gl.eglChooseConfig)(display, wanted.as_ptr(), &mut config, 1, &mut count);
        done("find a configuration", count == 1)?;
        let version = [EGL_CONTEXT_CLIENT_VERSION, 2, EGL_NONE];
        let context = (gl.eglCreateContext)(display, config, null_mut(), version.as_ptr());
        let current = (gl.eglMakeCurrent)(display, null_mut(), null_mut(), context);
        done("use a context", current != 0)?;
        let renderer = (gl.glGetString)(GL_RENDERER);
        done("ask who draws", !renderer.is_null())?;
        let renderer = CStr::from_ptr(renderer).to_string_lossy().into_owned();

        let (mut texture, mut target) = (0, 0);
        (gl.glGenTextures)(1, &mut texture);
        (gl.glBindTexture)(GL_TEXTURE_2D, texture);
        (gl.glTexImage2D)(
            GL_TEXTURE_2D,
            0,
            GL_RGBA as c_int,
            SIZE,
            SIZE,
            0,
            GL_RGBA,
            GL_UNSIGNED_BYTE,
            null(),
        );
        (gl.glGenFramebuffers)(1, &mut target);
        (gl.glBindFramebuffer)(GL_FRAMEBUFFER, target);
        (gl.glFramebufferTexture2D)(
            GL_FRAMEBUFFER,
            GL_COLOR_ATTACHMENT0,
            GL_TEXTURE_2D,
            texture,
            0,
        );
        let complete = (gl.glCheckFramebufferStatus)(GL_FRAMEBUFFER) == GL_FRAMEBUFFER_COMPLETE;
        done("draw into a texture", complete)?;
        (gl.glViewport)(0, 0, SIZE, SIZE);
        (gl.glClearColor)(0.0, 0.0, 1.0, 1.0);
        (gl.glClear)(GL_COLOR_BUFFER_BIT);

        let program = (gl.glCreateProgram)();
        for (kind, text) in [(GL_VERTEX_SHADER, VERTEX), (GL_FRAGMENT_SHADER, FRAGMENT)] {
            let shader = (gl.glCreateShader)(kind);
            (gl.glShaderSource)(shader, 1, &text.as_ptr(), null());
            (gl.glCompileShader)(shader);
            (gl.glAttachShader)(program, shader);
        }
        let name = CString::new("p").context("a name")?;
        (gl.glBindAttribLocation)(program, 0, name.as_ptr());
        (gl.glLinkProgram)(program);
        let mut linked = 0;
        (gl.glGetProgramiv)(program, GL_LINK_STATUS, &mut linked);
        done("link shaders", linked != 0)?;
        (gl.glUseProgram)(program);
        let left_half: [f32; 8] = [-1.0, -1.0, 0.0, -1.0, -1.0, 1.0, 0.0, 1.0];
        (gl.glVertexAttribPointer)(0, 2, GL_FLOAT, 0, 0, left_half.as_ptr().cast());
        (gl.glEnableVertexAttribArray)(0);
        (gl.glDrawArrays)(GL_TRIANGLE_STRIP, 0, 4);

        let mut pixels = vec![[0_u8; 4]; (SIZE * SIZE) as usize];
        let to = pixels.as_mut_ptr().cast();
        (gl.glReadPixels)(0, 0, SIZE, SIZE, GL_RGBA, GL_UNSIGNED_BYTE, to);
        done("draw", (gl.glGetError)() == 0)?;
        for (at, pixel) in pixels.iter().enumerate() {
            let left = at % (SIZE as usize) < SIZE as usize / 2;
            let expected = if left {
                [255, 0, 0, 255]
            } else {
                [0, 0, 255, 255]
            };
            if *pixel != expected {
                return Err(Failure(format!("pixel {at} is {pixel:?}")));
            }
        }
        Ok(format!("drawn by {renderer}"))
    }
}
