// The report as one HTML page that needs nothing else: no scripts, no other files.
#pragma once

#include <string>

#include "report/recommendation.h"
#include "report/results.h"

namespace thimble {

std::string write_page(const Results& results, const Recommendation& recommendation);

}  // namespace thimble
