// The table of one instruction set, from the functions of its namespace.
#pragma once

// clang-format off
#define QROSA_COMMON_KERNELS(isa, score_tile)                                                          \
  isa::dequant_rows, isa::packed_words, isa::pack_columns, isa::sddmm_rows, isa::decode_workspace,     \
  isa::decode_tile, isa::decode_prepare, isa::decode_rows, isa::score_tile, isa::score_add, isa::dropout, \
  isa::rms_norm, isa::gate

#define QROSA_KERNELS(isa)                                                                             \
  {QROSA_COMMON_KERNELS(isa, score_tile), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr}

#define QROSA_AMX_KERNELS(isa)                                                                         \
  {QROSA_COMMON_KERNELS(isa, score_tile_amx), isa::matmul_units, isa::matmul_workspace,               \
   isa::pack_factor, isa::token_workspace, isa::pack_tokens, isa::column_products,                     \
   isa::write_columns, isa::matmul}
// clang-format on
