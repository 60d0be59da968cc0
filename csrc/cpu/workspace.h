// Workspace: what a call allocates in addition to its tensors.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include <sys/mman.h>

namespace dfformer::cpu {

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// A multiple of the size of a complex register of any vector width. Workspaces are aligned to it.
inline constexpr std::int64_t alignment = 128, huge_page = 2 << 20;
inline std::int64_t padded(std::int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

// The size of an allocation. Large ones are mapped afresh at every call, so they use huge pages: faulting in small ones
// would take longer than the transforms.
inline std::int64_t allocated(std::int64_t bytes) {
    const std::int64_t unit = bytes >= 2 * huge_page ? huge_page : alignment;
    return (bytes + unit - 1) / unit * unit;
}

inline Memory allocate(std::int64_t bytes) {
    if (bytes == 0) return nullptr;
    const bool huge = bytes >= 2 * huge_page;
    void* memory = std::aligned_alloc(huge ? huge_page : alignment, allocated(bytes));
    if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (huge) madvise(memory, allocated(bytes), MADV_HUGEPAGE);
#endif
    return Memory(static_cast<char*>(memory));
}

}  // namespace dfformer::cpu
