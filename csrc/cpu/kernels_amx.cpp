#define QROSA_ISA amx
#include "dequant_add.h"
#include "dequant_matmul.h"
#include "dequant_spmm.h"
#include "dropout_kernel.h"
#include "gate.h"
#include "low_rank.h"
#include "rms_norm.h"
#include "score_amx.h"
#include "sddmm.h"
#include "table.h"

namespace qrosa {
const Kernels kAmxKernels = QROSA_AMX_KERNELS(amx);
}
