// The problems that are checked.
#pragma once

#include <cstdint>
#include <vector>

namespace {

struct Shape {
    std::int64_t B, H, W, C, F;
};

// For emulators: every radix, every kind of prime without an unrolled butterfly, full and partial tiles.
const std::vector<Shape> quick_shapes = {
    {2, 7, 7, 33, 4}, {1, 14, 8, 17, 4}, {2, 9, 15, 3, 5}, {1, 22, 26, 3, 2}, {1, 16, 3, 65, 1}, {3, 1, 1, 5, 4},
    {2, 2, 2, 3, 4},  {2, 1, 12, 3, 4},  {2, 13, 1, 1, 4}, {1, 2, 131, 3, 4}, {1, 101, 2, 3, 4},
};
const std::vector<Shape> shapes = {
    // the planes of the models' four stages; the last is large enough for threads to share one
    {2, 7, 7, 33, 4},
    {2, 14, 14, 17, 4},
    {3, 28, 28, 17, 4},
    {3, 56, 56, 17, 4},
    {1, 56, 56, 65, 4},
    // powers of two; with that many filters, more planes than slots
    {2, 16, 16, 65, 4},
    {1, 32, 32, 33, 4},
    {2, 64, 64, 17, 64},
    // odd and prime sides
    {2, 9, 15, 5, 4},
    {2, 13, 13, 17, 4},
    {1, 31, 31, 3, 4},
    // primes without an unrolled butterfly, with other factors or twice
    {2, 22, 26, 17, 4},
    {1, 121, 3, 17, 4},
    {1, 3, 143, 3, 4},
    // large primes, by Rader (101) and Bluestein (131), alone, with another factor, and twice; long sums along either
    // side
    {1, 101, 5, 17, 4},
    {1, 4, 131, 17, 4},
    {1, 101, 131, 7, 4},
    {1, 202, 3, 17, 4},
    {1, 3, 262, 3, 4},
    {1, 10201, 1, 1, 4},
    {1, 2048, 1, 17, 4},
    {1, 1, 10201, 1, 4},
    // lines transformed part by part, from their second pass on or from a later one
    {1, 512, 3, 17, 4},
    {1, 3, 1024, 17, 4},
    {1, 4608, 1, 3, 4},
    // rectangles
    {2, 6, 10, 7, 4},
    {2, 12, 5, 17, 4},
    {1, 5, 12, 33, 4},
    {1, 30, 105, 3, 4},
    // one row or one column
    {2, 1, 12, 3, 4},
    {2, 1, 7, 17, 4},
    {2, 12, 1, 3, 4},
    {1, 7, 1, 65, 4},
    {1, 1, 101, 3, 4},
    {1, 101, 1, 3, 4},
    // the smallest planes
    {3, 1, 1, 5, 4},
    {2, 2, 2, 3, 4},
    {2, 1, 2, 3, 4},
    {2, 2, 1, 3, 4},
    // channels: one, one more than registers hold, and full tiles alone, in whole groups and not
    {2, 8, 8, 1, 4},
    {1, 4, 4, 65, 4},
    {1, 8, 8, 128, 4},
    {2, 6, 6, 80, 4},
    // filters
    {2, 8, 8, 3, 1},
    {2, 7, 7, 17, 1},
    {2, 8, 8, 3, 2},
    {2, 7, 8, 17, 5},
};

}  // namespace
