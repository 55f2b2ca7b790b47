// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * Plugin of QEMU that counts how often each translated block is executed between two marks
 * (bench/src/window.rs). Writes a file per window: a line "ADDRESS INSTRUCTIONS COUNT CODE" per
 * block, where CODE has the first bytes of user code, which identify the program.
 *
 * Arguments: out=PATH, the files are PATH.0, PATH.1, ...; start=HEX and stop=HEX, the constants of
 * the marks. Needs -DAPI=1 for QEMU up to 8, -DAPI=3 from 9.1 on. One CPU only.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Debian packages no header; this is what the plugin uses of the documented interface. */
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef void (*translated_fn)(uint64_t id, struct qemu_plugin_tb *block);
typedef void (*executed_fn)(unsigned cpu, void *data);
enum { NO_REGISTERS };
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, translated_fn fn);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, executed_fn, int, void *data);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, executed_fn, int, void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t index);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);
#if API < 3
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
#else
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *, void *to, size_t length);
#endif

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = API;

enum { CODE = 16, INSTRUCTION_MAX = 15, BUCKETS = 1 << 18 };

struct block {
	struct block *next;
	uint64_t address, count;
	uint32_t instructions, code_length;
	uint8_t code[CODE];
};

static struct block *buckets[BUCKETS];
static uint64_t start, stop;
static const char *out;
static int counting, windows;

static size_t copy_instruction(const struct qemu_plugin_insn *instruction, uint8_t *to)
{
	size_t size = qemu_plugin_insn_size(instruction);
#if API < 3
	memcpy(to, qemu_plugin_insn_data(instruction), size);
	return size;
#else
	return qemu_plugin_insn_data(instruction, to, size);
#endif
}

static void on_block(unsigned cpu, void *data)
{
	((struct block *)data)->count += counting;
}

static void on_start(unsigned cpu, void *data)
{
	for (int i = 0; i < BUCKETS; i++)
		for (struct block *block = buckets[i]; block; block = block->next)
			block->count = 0;
	counting = 1;
}

static void on_stop(unsigned cpu, void *data)
{
	char path[4096];
	FILE *file;

	counting = 0;
	snprintf(path, sizeof path, "%s.%d", out, windows++);
	file = fopen(path, "w");
	if (!file) {
		perror(path);
		return;
	}
	for (int i = 0; i < BUCKETS; i++) {
		for (struct block *block = buckets[i]; block; block = block->next) {
			if (!block->count)
				continue;
			fprintf(file, "%llx %u %llu ", (unsigned long long)block->address,
				block->instructions, (unsigned long long)block->count);
			for (uint32_t j = 0; j < block->code_length; j++)
				fprintf(file, "%02x", block->code[j]);
			fputc('\n', file);
		}
	}
	fclose(file);
}

/* The block, known from an earlier translation or new. */
static struct block *find(const struct block *wanted)
{
	uint64_t hash = wanted->address * 31 + wanted->instructions;
	struct block **bucket, *block;

	for (int i = 0; i < CODE; i++)
		hash = hash * 31 + wanted->code[i];
	bucket = &buckets[(hash ^ hash >> 18) % BUCKETS];
	for (block = *bucket; block; block = block->next)
		if (block->address == wanted->address && block->instructions == wanted->instructions
		    && !memcmp(block->code, wanted->code, CODE))
			return block;
	block = malloc(sizeof *block);
	if (!block)
		abort();
	*block = *wanted;
	block->next = *bucket;
	return *bucket = block;
}

static void on_translation(uint64_t id, struct qemu_plugin_tb *tb)
{
	struct block block = {
		.address = qemu_plugin_tb_vaddr(tb),
		.instructions = qemu_plugin_tb_n_insns(tb),
	};

	/* Addresses of the kernel are unambiguous, and its code has no marks. */
	for (uint32_t i = 0; i < block.instructions && !(block.address >> 63); i++) {
		struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(tb, i);
		uint8_t bytes[INSTRUCTION_MAX + 1] = { 0 };
		size_t size = copy_instruction(instruction, bytes), rest = CODE - block.code_length;
		uint64_t constant;

		if (size < rest)
			rest = size;
		memcpy(block.code + block.code_length, bytes, rest);
		block.code_length += rest;
		/* A move of eight bytes to a register is ten bytes long. */
		memcpy(&constant, bytes + 2, sizeof constant);
		if (size == 10 && constant == start)
			qemu_plugin_register_vcpu_insn_exec_cb(instruction, on_start, NO_REGISTERS, NULL);
		if (size == 10 && constant == stop)
			qemu_plugin_register_vcpu_insn_exec_cb(instruction, on_stop, NO_REGISTERS, NULL);
	}
	qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block, NO_REGISTERS, find(&block));
}

EXPORT int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "out=", 4))
			out = strdup(argv[i] + 4);
		if (!strncmp(argv[i], "start=", 6))
			start = strtoull(argv[i] + 6, NULL, 16);
		if (!strncmp(argv[i], "stop=", 5))
			stop = strtoull(argv[i] + 5, NULL, 16);
	}
	if (!out || !start || !stop)
		return 1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
	return 0;
}
