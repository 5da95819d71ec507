// SPDX-License-Identifier: GPL-2.0-only
/*
 * Exports dma-bufs as the driver of a GPU does, for tests of those who import
 * them: in RAM or in BARs of any devices, in as many ranges as one likes, and
 * moved between them while they are imported.
 *
 * A buffer in BARs that its importer cannot reach migrates to RAM when it is
 * mapped, as those of amdgpu and xe do. Guests of these tests have no IOMMU,
 * so bus addresses are physical addresses.
 */
#include <linux/dma-buf.h>
#include <linux/dma-resv.h>
#include <linux/io.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci-p2pdma.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "fanlight_vram.h"

MODULE_IMPORT_NS("DMA_BUF");

#define MAX_RANGES (1 << 16)

/* A run of memory. */
struct chunk {
	u32 kind;
	phys_addr_t at;
	u64 len;
	struct page *page;
	struct pci_dev *pdev;
};

struct memory {
	struct chunk *chunks;
	u32 count;
	u64 size;
	/* How many chunks are in BARs. */
	u32 in_bars;
	bool raw;
};

struct buffer {
	struct memory memory;
	/* Held to read by page faults, to write by moves. */
	struct rw_semaphore lock;
	struct dma_buf *dmabuf;
	int distance;
};

static void memory_free(struct memory *memory)
{
	u32 i;

	for (i = 0; i < memory->count; i++) {
		if (memory->chunks[i].page)
			__free_page(memory->chunks[i].page);
		pci_dev_put(memory->chunks[i].pdev);
	}
	kvfree(memory->chunks);
	memset(memory, 0, sizeof(*memory));
}

static int add_ram(struct memory *memory, u64 len)
{
	for (; len; len -= PAGE_SIZE) {
		struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);
		struct chunk *chunk = &memory->chunks[memory->count];

		if (!page)
			return -ENOMEM;
		chunk->kind = FANLIGHT_VRAM_RAM;
		chunk->page = page;
		chunk->at = page_to_phys(page);
		chunk->len = PAGE_SIZE;
		memory->count++;
	}
	return 0;
}

static int add_bar(struct memory *memory,
		   const struct fanlight_vram_range *range)
{
	struct chunk *chunk = &memory->chunks[memory->count];
	struct pci_dev *pdev;
	u64 end;

	pdev = pci_get_domain_bus_and_slot(0, range->device >> 8,
					   range->device & 0xff);
	if (!pdev)
		return -ENODEV;
	chunk->kind = FANLIGHT_VRAM_BAR;
	chunk->pdev = pdev;
	chunk->len = range->len;
	memory->count++;
	memory->in_bars++;
	if (range->bar >= PCI_STD_NUM_BARS ||
	    check_add_overflow(range->offset, range->len, &end) ||
	    end > pci_resource_len(pdev, range->bar))
		return -EINVAL;
	chunk->at = pci_resource_start(pdev, range->bar) + range->offset;
	return 0;
}

static int add_raw(struct memory *memory,
		   const struct fanlight_vram_range *range)
{
	struct chunk *chunk = &memory->chunks[memory->count];

	chunk->kind = FANLIGHT_VRAM_RAW;
	chunk->at = range->offset;
	chunk->len = range->len;
	memory->count++;
	memory->raw = true;
	return 0;
}

static int memory_make(struct memory *memory,
		       const struct fanlight_vram_range *ranges, u32 count)
{
	u64 chunks = 0, size = 0;
	u32 i;
	int ret = 0;

	memset(memory, 0, sizeof(*memory));
	for (i = 0; i < count; i++) {
		u64 len = ranges[i].len;

		if (!len || !PAGE_ALIGNED(len) ||
		    !PAGE_ALIGNED(ranges[i].offset) || len > SZ_1G)
			return -EINVAL;
		size += len;
		chunks += ranges[i].kind == FANLIGHT_VRAM_RAM ?
				  len >> PAGE_SHIFT :
				  1;
	}
	if (!chunks || chunks > MAX_RANGES)
		return -EINVAL;
	memory->chunks = kvcalloc(chunks, sizeof(*memory->chunks), GFP_KERNEL);
	if (!memory->chunks)
		return -ENOMEM;
	memory->size = size;
	for (i = 0; i < count && !ret; i++) {
		switch (ranges[i].kind) {
		case FANLIGHT_VRAM_RAM:
			ret = add_ram(memory, ranges[i].len);
			break;
		case FANLIGHT_VRAM_BAR:
			ret = add_bar(memory, &ranges[i]);
			break;
		case FANLIGHT_VRAM_RAW:
			ret = add_raw(memory, &ranges[i]);
			break;
		default:
			ret = -EINVAL;
		}
	}
	if (ret)
		memory_free(memory);
	return ret;
}

static int memory_from_user(struct memory *memory,
			    const struct fanlight_vram_buffer *wanted)
{
	struct fanlight_vram_range *ranges;
	int ret;

	if (!wanted->count || wanted->count > MAX_RANGES)
		return -EINVAL;
	ranges = vmemdup_array_user(u64_to_user_ptr(wanted->ranges),
				    wanted->count, sizeof(*ranges));
	if (IS_ERR(ranges))
		return PTR_ERR(ranges);
	ret = memory_make(memory, ranges, wanted->count);
	kvfree(ranges);
	return ret;
}

/* The chunk that holds a byte, and where it is. */
static const struct chunk *memory_find(const struct memory *memory, u64 offset,
				       phys_addr_t *at)
{
	u32 i;

	for (i = 0; i < memory->count; i++) {
		const struct chunk *chunk = &memory->chunks[i];

		if (offset < chunk->len) {
			*at = chunk->at + offset;
			return chunk;
		}
		offset -= chunk->len;
	}
	return NULL;
}

/* Copies one page between RAM and BARs, through a page that is in neither. */
static int copy_page_at(const struct memory *to, const struct memory *from,
			u64 offset, void *bounce)
{
	phys_addr_t source, target;
	const struct chunk *chunk = memory_find(from, offset, &source);
	void __iomem *io;

	if (chunk->page) {
		memcpy(bounce, page_address(chunk->page), PAGE_SIZE);
	} else {
		io = ioremap_wc(source, PAGE_SIZE);
		if (!io)
			return -ENOMEM;
		memcpy_fromio(bounce, io, PAGE_SIZE);
		iounmap(io);
	}
	chunk = memory_find(to, offset, &target);
	if (chunk->page) {
		memcpy(page_address(chunk->page), bounce, PAGE_SIZE);
	} else {
		io = ioremap_wc(target, PAGE_SIZE);
		if (!io)
			return -ENOMEM;
		memcpy_toio(io, bounce, PAGE_SIZE);
		iounmap(io);
	}
	return 0;
}

/*
 * Puts the buffer into other memory, which it takes, or leaves to the caller
 * if it fails. The reservation is locked, and importers know.
 */
static int buffer_replace(struct buffer *buffer, struct memory *memory)
{
	u64 offset;
	void *bounce;
	int ret = 0;

	if (memory->size != buffer->memory.size || memory->raw ||
	    buffer->memory.raw)
		return -EINVAL;
	bounce = kmalloc(PAGE_SIZE, GFP_KERNEL);
	if (!bounce)
		return -ENOMEM;
	down_write(&buffer->lock);
	/* Who draws faults, and finds the new memory. */
	unmap_mapping_range(buffer->dmabuf->file->f_mapping, 0, 0, 1);
	for (offset = 0; offset < memory->size && !ret; offset += PAGE_SIZE)
		ret = copy_page_at(memory, &buffer->memory, offset, bounce);
	if (!ret)
		swap(buffer->memory, *memory);
	up_write(&buffer->lock);
	kfree(bounce);
	return ret;
}

/* Whether the importer reaches every BAR that the buffer is in. */
static bool reaches_all(struct buffer *buffer,
			struct dma_buf_attachment *attachment)
{
	bool reaches = attachment->peer2peer;
	u32 i;

	buffer->distance = -1;
	for (i = 0; i < buffer->memory.count; i++) {
		struct pci_dev *pdev = buffer->memory.chunks[i].pdev;
		int distance;

		/* One device's chunks stand together, mostly. */
		if (!pdev || (i && pdev == buffer->memory.chunks[i - 1].pdev))
			continue;
		distance = pci_p2pdma_distance(pdev, attachment->dev, true);
		if (buffer->distance < 0)
			buffer->distance = distance;
		reaches &= distance >= 0;
	}
	return reaches;
}

static int to_ram(struct buffer *buffer)
{
	struct fanlight_vram_range range = {
		.kind = FANLIGHT_VRAM_RAM,
		.len = buffer->memory.size,
	};
	struct memory memory;
	int ret;

	ret = memory_make(&memory, &range, 1);
	if (ret)
		return ret;
	ret = buffer_replace(buffer, &memory);
	memory_free(&memory);
	return ret;
}

static struct sg_table *vram_map(struct dma_buf_attachment *attachment,
				 enum dma_data_direction direction)
{
	struct buffer *buffer = attachment->dmabuf->priv;
	struct scatterlist *sg;
	struct sg_table *sgt;
	int ret, i;

	dma_resv_assert_held(attachment->dmabuf->resv);
	if (buffer->memory.in_bars && !reaches_all(buffer, attachment)) {
		ret = to_ram(buffer);
		if (ret)
			return ERR_PTR(ret);
	}
	sgt = kzalloc(sizeof(*sgt), GFP_KERNEL);
	if (!sgt)
		return ERR_PTR(-ENOMEM);
	ret = sg_alloc_table(sgt, buffer->memory.count, GFP_KERNEL);
	if (ret) {
		kfree(sgt);
		return ERR_PTR(ret);
	}
	for_each_sgtable_dma_sg(sgt, sg, i) {
		sg_dma_address(sg) = buffer->memory.chunks[i].at;
		sg_dma_len(sg) = buffer->memory.chunks[i].len;
	}
	return sgt;
}

static void vram_unmap(struct dma_buf_attachment *attachment,
		       struct sg_table *sgt, enum dma_data_direction direction)
{
	sg_free_table(sgt);
	kfree(sgt);
}

static vm_fault_t vram_fault(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = vmf->vma;
	struct buffer *buffer = vma->vm_private_data;
	const struct chunk *chunk;
	pgprot_t prot = vma->vm_page_prot;
	vm_fault_t ret = VM_FAULT_SIGBUS;
	phys_addr_t at;

	down_read(&buffer->lock);
	chunk = memory_find(&buffer->memory, (u64)vmf->pgoff << PAGE_SHIFT,
			    &at);
	if (chunk) {
		if (!chunk->page)
			prot = pgprot_writecombine(prot);
		ret = vmf_insert_pfn_prot(vma, vmf->address, PHYS_PFN(at),
					  prot);
	}
	up_read(&buffer->lock);
	return ret;
}

static const struct vm_operations_struct vram_vm_ops = {
	.fault = vram_fault,
};

static int vram_mmap(struct dma_buf *dmabuf, struct vm_area_struct *vma)
{
	struct buffer *buffer = dmabuf->priv;

	if (buffer->memory.raw)
		return -EINVAL;
	vm_flags_set(vma, VM_PFNMAP | VM_IO | VM_DONTEXPAND | VM_DONTDUMP);
	vma->vm_ops = &vram_vm_ops;
	vma->vm_private_data = buffer;
	return 0;
}

static void vram_release(struct dma_buf *dmabuf)
{
	struct buffer *buffer = dmabuf->priv;

	memory_free(&buffer->memory);
	kfree(buffer);
}

static const struct dma_buf_ops vram_ops = {
	.map_dma_buf = vram_map,
	.unmap_dma_buf = vram_unmap,
	.mmap = vram_mmap,
	.release = vram_release,
};

static int vram_create(struct fanlight_vram_buffer *wanted)
{
	DEFINE_DMA_BUF_EXPORT_INFO(info);
	struct buffer *buffer;
	int ret;

	buffer = kzalloc(sizeof(*buffer), GFP_KERNEL);
	if (!buffer)
		return -ENOMEM;
	init_rwsem(&buffer->lock);
	buffer->distance = -1;
	ret = memory_from_user(&buffer->memory, wanted);
	if (ret) {
		kfree(buffer);
		return ret;
	}
	info.ops = &vram_ops;
	info.size = buffer->memory.size;
	info.flags = O_RDWR;
	info.priv = buffer;
	buffer->dmabuf = dma_buf_export(&info);
	if (IS_ERR(buffer->dmabuf)) {
		ret = PTR_ERR(buffer->dmabuf);
		memory_free(&buffer->memory);
		kfree(buffer);
		return ret;
	}
	ret = dma_buf_fd(buffer->dmabuf, O_CLOEXEC);
	if (ret < 0) {
		dma_buf_put(buffer->dmabuf);
		return ret;
	}
	wanted->fd = ret;
	return 0;
}

static int vram_move(struct buffer *buffer,
		     const struct fanlight_vram_buffer *wanted)
{
	struct dma_resv *resv = buffer->dmabuf->resv;
	struct memory memory;
	int ret;

	ret = memory_from_user(&memory, wanted);
	if (ret)
		return ret;
	dma_resv_lock(resv, NULL);
	dma_buf_invalidate_mappings(buffer->dmabuf);
	dma_resv_wait_timeout(resv, DMA_RESV_USAGE_BOOKKEEP, false,
			      MAX_SCHEDULE_TIMEOUT);
	ret = buffer_replace(buffer, &memory);
	dma_resv_unlock(resv);
	/* What it was in, or if that failed, what it was to be in. */
	memory_free(&memory);
	return ret;
}

static int vram_where(struct buffer *buffer,
		      struct fanlight_vram_buffer *answer)
{
	down_read(&buffer->lock);
	answer->count = buffer->memory.in_bars;
	answer->distance = buffer->distance;
	up_read(&buffer->lock);
	return 0;
}

static long vram_ioctl(struct file *file, unsigned int request,
		       unsigned long argument)
{
	struct fanlight_vram_buffer wanted;
	void __user *user = (void __user *)argument;
	struct dma_buf *dmabuf;
	int ret;

	if (copy_from_user(&wanted, user, sizeof(wanted)))
		return -EFAULT;
	if (request == FANLIGHT_VRAM_CREATE) {
		ret = vram_create(&wanted);
	} else {
		dmabuf = dma_buf_get(wanted.fd);
		if (IS_ERR(dmabuf))
			return PTR_ERR(dmabuf);
		if (dmabuf->ops != &vram_ops)
			ret = -EINVAL;
		else if (request == FANLIGHT_VRAM_MOVE)
			ret = vram_move(dmabuf->priv, &wanted);
		else if (request == FANLIGHT_VRAM_WHERE)
			ret = vram_where(dmabuf->priv, &wanted);
		else
			ret = -ENOTTY;
		dma_buf_put(dmabuf);
	}
	if (!ret && copy_to_user(user, &wanted, sizeof(wanted)))
		ret = -EFAULT;
	return ret;
}

static const struct file_operations vram_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = vram_ioctl,
};

static struct miscdevice vram_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "fanlight-vram",
	.fops = &vram_fops,
};
module_misc_device(vram_device);

MODULE_DESCRIPTION("Exports dma-bufs in RAM and in BARs, for tests");
MODULE_LICENSE("GPL");
