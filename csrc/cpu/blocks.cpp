#include "blocks.h"

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include <pthread.h>

#include "workspace.h"

namespace dfformer::cpu {
namespace {

struct Block {
    Memory memory;
    std::int64_t bytes;
    bool old = false;
};
struct Kept {
    std::mutex mutex;
    std::vector<Block> blocks;  // the oldest first

    Kept() { blocks.reserve(max_kept_blocks + 1); }
};

Kept& kept() {
    static Kept& kept = *[] {
        pthread_atfork([] { cpu::kept().mutex.lock(); }, [] { cpu::kept().mutex.unlock(); },
                       [] { cpu::kept().mutex.unlock(); });
        return new Kept;  // which the last tensors of a process may outlive otherwise
    }();
    return kept;
}

}  // namespace

void* take_block(std::int64_t bytes) {
    {
        const std::lock_guard lock(kept().mutex);
        auto& blocks = kept().blocks;
        const auto same = std::find_if(blocks.rbegin(), blocks.rend(), [=](auto& b) { return b.bytes == bytes; });
        if (same != blocks.rend()) {
            char* const memory = same->memory.release();
            blocks.erase(std::next(same).base());
            return memory;
        }
    }
    return allocate(bytes).release();
}

void give_block(void* memory, std::int64_t bytes) {
    if (!memory) return;
    Block block{Memory(static_cast<char*>(memory)), bytes};
#ifdef MADV_FREE
    madvise(memory, allocated(bytes), MADV_FREE);
#endif
    const std::lock_guard lock(kept().mutex);
    auto& blocks = kept().blocks;
    blocks.push_back(std::move(block));
    if (blocks.size() > max_kept_blocks) {
        std::swap(block, blocks.front());  // is freed after the lock
        blocks.erase(blocks.begin());
    }
}

void free_kept_blocks() {
    const std::lock_guard lock(kept().mutex);
    kept().blocks.clear();
}

void free_old_blocks() {
    const std::lock_guard lock(kept().mutex);
    std::erase_if(kept().blocks, [](Block& block) { return std::exchange(block.old, true); });
}

}  // namespace dfformer::cpu
