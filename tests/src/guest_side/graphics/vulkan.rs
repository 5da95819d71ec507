//! Vulkan as any program uses it: a computation and a picture, in memory that the CPU can read.

use ash::vk;

use crate::{Context, Failure, Result};

const NUMBERS: u32 = 256;
const SIZE: u32 = 64;

/// A compute shader that multiplies each number of a buffer by three and adds one.
fn shader() -> Vec<u32> {
    let mut code = vec![0x0723_0203, 0x0001_0000, 0, 30, 0];
    let mut op = |number: u32, operands: &[u32]| {
        code.push((operands.len() as u32 + 1) << 16 | number);
        code.extend(operands);
    };
    let [main, id, array, block, buffer] = [1, 2, 3, 4, 5];
    let [void, function, uint, vector, vector_in, block_ptr, uint_ptr] = [6, 7, 8, 9, 10, 11, 12];
    let [
        zero,
        one,
        three,
        label,
        loaded,
        index,
        place,
        old,
        product,
        sum,
    ] = [13, 14, 15, 16, 17, 18, 19, 20, 21, 22];
    op(17, &[1]); // OpCapability Shader
    op(14, &[0, 1]); // OpMemoryModel Logical GLSL450
    op(15, &[5, main, u32::from_le_bytes(*b"main"), 0, id]); // OpEntryPoint GLCompute
    op(16, &[main, 17, 1, 1, 1]); // OpExecutionMode LocalSize
    op(71, &[id, 11, 28]); // OpDecorate BuiltIn GlobalInvocationId
    op(71, &[array, 6, 4]); // OpDecorate ArrayStride
    op(72, &[block, 0, 35, 0]); // OpMemberDecorate Offset
    op(71, &[block, 3]); // OpDecorate BufferBlock
    op(71, &[buffer, 34, 0]); // OpDecorate DescriptorSet
    op(71, &[buffer, 33, 0]); // OpDecorate Binding
    op(19, &[void]); // OpTypeVoid
    op(33, &[function, void]); // OpTypeFunction
    op(21, &[uint, 32, 0]); // OpTypeInt
    op(23, &[vector, uint, 3]); // OpTypeVector
    op(32, &[vector_in, 1, vector]); // OpTypePointer Input
    op(59, &[vector_in, id, 1]); // OpVariable Input
    op(29, &[array, uint]); // OpTypeRuntimeArray
    op(30, &[block, array]); // OpTypeStruct
    op(32, &[block_ptr, 2, block]); // OpTypePointer Uniform
    op(59, &[block_ptr, buffer, 2]); // OpVariable Uniform
    op(32, &[uint_ptr, 2, uint]); // OpTypePointer Uniform
    op(43, &[uint, zero, 0]); // OpConstant
    op(43, &[uint, one, 1]); // OpConstant
    op(43, &[uint, three, 3]); // OpConstant
    op(54, &[void, main, 0, function]); // OpFunction
    op(248, &[label]); // OpLabel
    op(61, &[vector, loaded, id]); // OpLoad
    op(81, &[uint, index, loaded, 0]); // OpCompositeExtract
    op(65, &[uint_ptr, place, buffer, zero, index]); // OpAccessChain
    op(61, &[uint, old, place]); // OpLoad
    op(132, &[uint, product, old, three]); // OpIMul
    op(128, &[uint, sum, product, one]); // OpIAdd
    op(62, &[place, sum]); // OpStore
    op(253, &[]); // OpReturn
    op(56, &[]); // OpFunctionEnd
    code
}

/// A device with a queue for compute and graphics.
struct Device {
    device: ash::Device,
    family: u32,
    queue: vk::Queue,
    memory: vk::PhysicalDeviceMemoryProperties,
    name: String,
    _instance: ash::Instance,
    _entry: ash::Entry,
}

impl Device {
    fn open() -> Result<Self> {
        // SAFETY: the library is Vulkan's loader; calls follow the specification.
        unsafe {
            let entry = ash::Entry::load().context("no libvulkan.so.1")?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
            let info = vk::InstanceCreateInfo::default().application_info(&application);
            let instance = entry
                .create_instance(&info, None)
                .context("cannot make an instance")?;
            let all = instance
                .enumerate_physical_devices()
                .context("cannot list devices")?;
            let physical = *all.first().ok_or(Failure("there is no device".into()))?;
            let name = instance.get_physical_device_properties(physical);
            let name = name
                .device_name_as_c_str()
                .context("a device without a name")?
                .to_string_lossy()
                .into_owned();
            let wanted = vk::QueueFlags::COMPUTE | vk::QueueFlags::GRAPHICS;
            let families = instance.get_physical_device_queue_family_properties(physical);
            let family = families
                .iter()
                .position(|family| family.queue_flags.contains(wanted))
                .ok_or(Failure("there is no queue".into()))? as u32;
            let queues = [vk::DeviceQueueCreateInfo::default()
                .queue_family_index(family)
                .queue_priorities(&[1.0])];
            let info = vk::DeviceCreateInfo::default().queue_create_infos(&queues);
            let device = instance
                .create_device(physical, &info, None)
                .context("cannot make a device")?;
            Ok(Self {
                queue: device.get_device_queue(family, 0),
                memory: instance.get_physical_device_memory_properties(physical),
                device,
                family,
                name,
                _instance: instance,
                _entry: entry,
            })
        }
    }

    fn allocate(
        &self,
        needs: &vk::MemoryRequirements,
        properties: vk::MemoryPropertyFlags,
    ) -> Result<vk::DeviceMemory> {
        let types = self.memory.memory_types_as_slice();
        let index = types.iter().enumerate().position(|(index, kind)| {
            needs.memory_type_bits & 1 << index != 0 && kind.property_flags.contains(properties)
        });
        let index = index.ok_or(Failure("there is no memory of this kind".into()))?;
        let info = vk::MemoryAllocateInfo::default()
            .allocation_size(needs.size)
            .memory_type_index(index as u32);
        // SAFETY: the structure is complete.
        unsafe { self.device.allocate_memory(&info, None) }.context("cannot allocate memory")
    }

    /// A buffer of numbers that the CPU can access.
    fn buffer(&self, numbers: u32, usage: vk::BufferUsageFlags) -> Result<(vk::Buffer, *mut u32)> {
        let size = u64::from(numbers) * 4;
        let info = vk::BufferCreateInfo::default().size(size).usage(usage);
        let visible =
            vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
        // SAFETY: calls follow the specification.
        unsafe {
            let buffer = self
                .device
                .create_buffer(&info, None)
                .context("cannot make a buffer")?;
            let needs = self.device.get_buffer_memory_requirements(buffer);
            let memory = self.allocate(&needs, visible)?;
            self.device
                .bind_buffer_memory(buffer, memory, 0)
                .context("cannot bind memory")?;
            let at = self
                .device
                .map_memory(memory, 0, size, vk::MemoryMapFlags::empty())
                .context("cannot map memory")?;
            Ok((buffer, at.cast()))
        }
    }

    /// Records commands, runs them, and waits.
    fn run(&self, record: impl FnOnce(vk::CommandBuffer)) -> Result<()> {
        // SAFETY: calls follow the specification.
        unsafe {
            let info = vk::CommandPoolCreateInfo::default().queue_family_index(self.family);
            let pool = self
                .device
                .create_command_pool(&info, None)
                .context("cannot make a pool")?;
            let info = vk::CommandBufferAllocateInfo::default()
                .command_pool(pool)
                .command_buffer_count(1);
            let commands = self
                .device
                .allocate_command_buffers(&info)
                .context("cannot make a command buffer")?;
            self.device
                .begin_command_buffer(commands[0], &vk::CommandBufferBeginInfo::default())
                .context("cannot record")?;
            record(commands[0]);
            self.device
                .end_command_buffer(commands[0])
                .context("cannot record")?;
            let submits = [vk::SubmitInfo::default().command_buffers(&commands)];
            let fence = self
                .device
                .create_fence(&vk::FenceCreateInfo::default(), None)
                .context("cannot make a fence")?;
            self.device
                .queue_submit(self.queue, &submits, fence)
                .context("cannot submit")?;
            self.device
                .wait_for_fences(&[fence], true, u64::MAX)
                .context("cannot wait")
        }
    }
}

/// Computes with some numbers, fills a picture, and checks all results. Returns the device's name.
pub fn work() -> Result<String> {
    let device = Device::open()?;
    compute(&device)?;
    fill(&device)?;
    Ok(format!("computed and drawn by {}", device.name))
}

fn compute(device: &Device) -> Result<()> {
    let (buffer, numbers) = device.buffer(NUMBERS, vk::BufferUsageFlags::STORAGE_BUFFER)?;
    let vk = &device.device;
    // SAFETY: calls follow the specification; the memory is mapped and long enough.
    unsafe {
        for index in 0..NUMBERS {
            numbers.add(index as usize).write_volatile(index * 7);
        }
        let code = shader();
        let info = vk::ShaderModuleCreateInfo::default().code(&code);
        let module = vk
            .create_shader_module(&info, None)
            .context("cannot make a shader")?;
        let bindings = [vk::DescriptorSetLayoutBinding::default()
            .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
            .descriptor_count(1)
            .stage_flags(vk::ShaderStageFlags::COMPUTE)];
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        let layouts = [vk
            .create_descriptor_set_layout(&info, None)
            .context("cannot make a layout")?];
        let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&layouts);
        let layout = vk
            .create_pipeline_layout(&info, None)
            .context("cannot make a layout")?;
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"main");
        let infos = [vk::ComputePipelineCreateInfo::default()
            .stage(stage)
            .layout(layout)];
        let pipelines = vk
            .create_compute_pipelines(vk::PipelineCache::null(), &infos, None)
            .map_err(|(_, error)| error)
            .context("cannot make a pipeline")?;
        let sizes = [vk::DescriptorPoolSize::default()
            .ty(vk::DescriptorType::STORAGE_BUFFER)
            .descriptor_count(1)];
        let info = vk::DescriptorPoolCreateInfo::default()
            .max_sets(1)
            .pool_sizes(&sizes);
        let pool = vk
            .create_descriptor_pool(&info, None)
            .context("cannot make a pool")?;
        let info = vk::DescriptorSetAllocateInfo::default()
            .descriptor_pool(pool)
            .set_layouts(&layouts);
        let sets = vk
            .allocate_descriptor_sets(&info)
            .context("cannot make a descriptor")?;
        let buffers = [vk::DescriptorBufferInfo::default()
            .buffer(buffer)
            .range(vk::WHOLE_SIZE)];
        let writes = [vk::WriteDescriptorSet::default()
            .dst_set(sets[0])
            .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
            .buffer_info(&buffers)];
        vk.update_descriptor_sets(&writes, &[]);
        device.run(|commands| {
            let point = vk::PipelineBindPoint::COMPUTE;
            vk.cmd_bind_pipeline(commands, point, pipelines[0]);
            vk.cmd_bind_descriptor_sets(commands, point, layout, 0, &sets, &[]);
            vk.cmd_dispatch(commands, NUMBERS, 1, 1);
        })?;
        for index in 0..NUMBERS {
            let number = numbers.add(index as usize).read_volatile();
            if number != index * 21 + 1 {
                return Err(Failure(format!("number {index} is {number}")));
            }
        }
    }
    Ok(())
}

/// Clears an image by a render pass, and reads it back.
fn fill(device: &Device) -> Result<()> {
    let (buffer, pixels) = device.buffer(SIZE * SIZE, vk::BufferUsageFlags::TRANSFER_DST)?;
    let vk = &device.device;
    let extent = vk::Extent3D {
        width: SIZE,
        height: SIZE,
        depth: 1,
    };
    // SAFETY: calls follow the specification; the memory is mapped and long enough.
    unsafe {
        let info = vk::ImageCreateInfo::default()
            .image_type(vk::ImageType::TYPE_2D)
            .format(vk::Format::R8G8B8A8_UNORM)
            .extent(extent)
            .mip_levels(1)
            .array_layers(1)
            .samples(vk::SampleCountFlags::TYPE_1)
            .usage(vk::ImageUsageFlags::COLOR_ATTACHMENT | vk::ImageUsageFlags::TRANSFER_SRC);
        let image = vk
            .create_image(&info, None)
            .context("cannot make an image")?;
        let needs = vk.get_image_memory_requirements(image);
        let memory = device.allocate(&needs, vk::MemoryPropertyFlags::empty())?;
        vk.bind_image_memory(image, memory, 0)
            .context("cannot bind memory")?;
        let layers = vk::ImageSubresourceRange::default()
            .aspect_mask(vk::ImageAspectFlags::COLOR)
            .level_count(1)
            .layer_count(1);
        let info = vk::ImageViewCreateInfo::default()
            .image(image)
            .view_type(vk::ImageViewType::TYPE_2D)
            .format(vk::Format::R8G8B8A8_UNORM)
            .subresource_range(layers);
        let views = [vk
            .create_image_view(&info, None)
            .context("cannot make a view")?];
        let attachments = [vk::AttachmentDescription::default()
            .format(vk::Format::R8G8B8A8_UNORM)
            .samples(vk::SampleCountFlags::TYPE_1)
            .load_op(vk::AttachmentLoadOp::CLEAR)
            .store_op(vk::AttachmentStoreOp::STORE)
            .final_layout(vk::ImageLayout::TRANSFER_SRC_OPTIMAL)];
        let colors = [
            vk::AttachmentReference::default().layout(vk::ImageLayout::COLOR_ATTACHMENT_OPTIMAL)
        ];
        let subpasses = [vk::SubpassDescription::default()
            .pipeline_bind_point(vk::PipelineBindPoint::GRAPHICS)
            .color_attachments(&colors)];
        let after = [vk::SubpassDependency::default()
            .dst_subpass(vk::SUBPASS_EXTERNAL)
            .src_stage_mask(vk::PipelineStageFlags::COLOR_ATTACHMENT_OUTPUT)
            .dst_stage_mask(vk::PipelineStageFlags::TRANSFER)
            .src_access_mask(vk::AccessFlags::COLOR_ATTACHMENT_WRITE)
            .dst_access_mask(vk::AccessFlags::TRANSFER_READ)];
        let info = vk::RenderPassCreateInfo::default()
            .attachments(&attachments)
            .subpasses(&subpasses)
            .dependencies(&after);
        let pass = vk
            .create_render_pass(&info, None)
            .context("cannot make a render pass")?;
        let info = vk::FramebufferCreateInfo::default()
            .render_pass(pass)
            .attachments(&views)
            .width(SIZE)
            .height(SIZE)
            .layers(1);
        let framebuffer = vk
            .create_framebuffer(&info, None)
            .context("cannot make a framebuffer")?;
        let clears = [vk::ClearValue {
            color: vk::ClearColorValue {
                float32: [0.0, 1.0, 0.0, 1.0],
            },
        }];
        let area = vk::Rect2D {
            offset: vk::Offset2D::default(),
            extent: vk::Extent2D {
                width: SIZE,
                height: SIZE,
            },
        };
        let copies = [vk::BufferImageCopy::default()
            .image_subresource(
                vk::ImageSubresourceLayers::default()
                    .aspect_mask(vk::ImageAspectFlags::COLOR)
                    .layer_count(1),
            )
            .image_extent(extent)];
        device.run(|commands| {
            let begin = vk::RenderPassBeginInfo::default()
                .render_pass(pass)
                .framebuffer(framebuffer)
                .render_area(area)
                .clear_values(&clears);
            vk.cmd_begin_render_pass(commands, &begin, vk::SubpassContents::INLINE);
            vk.cmd_end_render_pass(commands);
            let from = vk::ImageLayout::TRANSFER_SRC_OPTIMAL;
            vk.cmd_copy_image_to_buffer(commands, image, from, buffer, &copies);
        })?;
        for index in 0..SIZE * SIZE {
            let pixel = pixels.add(index as usize).read_volatile().to_le_bytes();
            if pixel != [0, 255, 0, 255] {
                return Err(Failure(format!("pixel {index} is {pixel:?}")));
            }
        }
    }
    Ok(())
}
