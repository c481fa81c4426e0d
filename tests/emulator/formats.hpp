// The 16-bit formats and TF32, as the hardware converts them.
#pragma once

#include "language.hpp"

namespace emulator {

static inline float float_of_bf16(u16 bits) {
    return bits_as<float>(u32(bits) << 16);
}

static inline u16 bf16_of_float(float value) {
    const u32 bits = bits_as<u32>(value);
    if (value != value) {
        return 0x7fff;
    }
    return u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float float_of_f16(u16 bits) {
    return float(bits_as<_Float16>(bits));
}

static inline u16 f16_of_float(float value) {
    return value != value ? 0x7fff : bits_as<u16>(_Float16(value));
}

// Products do not look at the low 13 bits.
static inline float float_of_tf32(u32 bits) {
    return bits_as<float>(bits & 0xffffe000);
}

// The nearest, ties away from zero.
static inline u32 tf32_of_float(float value) {
    const u32 bits = bits_as<u32>(value);
    if (value != value) {
        return 0x7fffffff;
    }
    return isinf(value) ? bits : (bits + 0x1000) & 0xffffe000;
}

}  // namespace emulator
