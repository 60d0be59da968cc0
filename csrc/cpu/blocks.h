// Blocks of memory for large tensors. Those that are freed last are kept for tensors of the same size to come: fresh
// ones would be faulted in page by page, which takes longer than the filter step does with them.
#pragma once

#include <cstdint>

namespace dfformer::cpu {

inline constexpr int max_kept_blocks = 4;

// Throws std::bad_alloc.
void* take_block(std::int64_t bytes);
// The system may take the memory of a kept block where it runs short, without asking. From any thread.
void give_block(void* block, std::int64_t bytes);
void free_kept_blocks();
// Only those that were kept at the last call already.
void free_old_blocks();

}  // namespace dfformer::cpu
