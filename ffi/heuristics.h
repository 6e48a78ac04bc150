// Which configuration serves a problem: a pure function of static facts, testable without a GPU.
#pragma once

#include "config.h"

namespace w4a16 {

// The configuration expected to be fastest among those that CanImplement accepts and whose
// workspace is at most `workspace_limit_bytes` (-1: no limit). On a refusal *config is untouched
// and the status says why.
Status Select(const Problem& problem, const Device& device, int64_t workspace_limit_bytes,
              const Config** config);

// The same for a ragged product of `experts` experts. How the rows fall to them is not known.
Status SelectRagged(const Problem& problem, int64_t experts, const Device& device,
                    const Config** config);

}  // namespace w4a16
