#define QROSA_ISA avx512bf16
#include "dequant_add.h"
#include "dequant_spmm.h"
#include "dropout_kernel.h"
#include "gate.h"
#include "rms_norm.h"
#include "score_accumulate.h"
#include "sddmm.h"
#include "table.h"

namespace qrosa {
const Kernels kAvx512Bf16Kernels = QROSA_KERNELS(avx512bf16);
}
