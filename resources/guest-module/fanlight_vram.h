/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/* What /dev/fanlight-vram understands. */
#ifndef FANLIGHT_VRAM_H
#define FANLIGHT_VRAM_H

#include <linux/ioctl.h>
#include <linux/types.h>

enum fanlight_vram_kind {
	/* Pages of the guest's RAM, each wherever it is free. */
	FANLIGHT_VRAM_RAM = 0,
	/* A part of a BAR. */
	FANLIGHT_VRAM_BAR = 1,
	/* Physical addresses, whatever is there. Such a buffer cannot be moved or mapped. */
	FANLIGHT_VRAM_RAW = 2,
};

struct fanlight_vram_range {
	__u32 kind;
	/* Of a BAR: bus << 8 | device << 3 | function, in domain 0. */
	__u32 device;
	__u32 bar;
	__u32 pad;
	/* In the BAR, or the physical address. */
	__u64 offset;
	/* Whole pages. */
	__u64 len;
};

struct fanlight_vram_buffer {
	/* FANLIGHT_VRAM_CREATE gives it, the others take it. */
	__s32 fd;
	/* How many ranges. FANLIGHT_VRAM_WHERE gives how many are in BARs. */
	__u32 count;
	/* Points to them. */
	__u64 ranges;
	/*
	 * FANLIGHT_VRAM_WHERE gives the distance of the importer from the
	 * first BAR's device, as pci_p2pdma_distance() says; -1 if they cannot
	 * reach each other.
	 */
	__s32 distance;
	__u32 pad;
};

/* Makes a buffer. */
#define FANLIGHT_VRAM_CREATE _IOWR('F', 1, struct fanlight_vram_buffer)
/* Gives a buffer other memory, with its bytes. */
#define FANLIGHT_VRAM_MOVE _IOWR('F', 2, struct fanlight_vram_buffer)
/* Tells where a buffer is. */
#define FANLIGHT_VRAM_WHERE _IOWR('F', 3, struct fanlight_vram_buffer)

#endif
