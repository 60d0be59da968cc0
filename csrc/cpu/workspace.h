// Memory that a call needs beside its tensors.
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

// A multiple of a complex number's size in any vector width, which is also what workspaces are aligned to.
inline constexpr std::int64_t alignment = 128, huge_page = 2 << 20;
inline std::int64_t padded(std::int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

// What is allocated for so many bytes. From some size on every call gets fresh pages, whose faults would cost more than
// the transforms were they not large ones.
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
