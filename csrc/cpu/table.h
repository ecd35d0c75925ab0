// The table of one instruction set, from the functions of its namespace.
#pragma once

#define QROSA_KERNELS(isa)                                                                                        \
  {isa::dequant_rows,   isa::packed_words, isa::pack_columns, isa::sddmm_rows, isa::spmm_workspace, isa::spmm_prepare, \
   isa::spmm_rows,      isa::score_tile,   isa::score_add,    isa::dropout}
