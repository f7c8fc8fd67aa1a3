// common/math.cuh against f64.
#include <cmath>

#include "harness.h"

#include "common/math.cuh"

TEST(gelu_for_16_bit_results_errs_less_than_an_eighth_of_their_rounding) {
    // Half an ulp of f16, the finer of the two, is at least 2^-12 of the value.
    const double allowed = std::ldexp(1.0, -12) / 8.0;
    double worst = 0.0, at = 0.0;
    for (int i = -1300000; i <= 1300000; i++) {
        const float z = float(i) * 1e-5f;
        const double want = 0.5 * double(z) * std::erfc(-double(z) / std::sqrt(2.0));
        const double error = want == 0.0 ? 0.0 : std::fabs(gelu_16_bit(z) / want - 1.0);
        if (!(error <= worst)) worst = error, at = z;
    }
    if (!(worst <= 1e-5 && worst <= allowed)) fail("gelu_16_bit(%g) errs by %g of its value", at, worst);
    // Far out it is z, and 0 where exp(-z^2 / 2) is; the limits are those of erf's formula.
    for (const float z : {14.f, 1e3f, 1e30f, INFINITY}) CHECK(gelu_16_bit(z) == z && gelu_16_bit(0.f) == 0.f);
    for (const float z : {-15.f, -1e3f, -1e30f}) CHECK(gelu_16_bit(z) == 0.f);
    CHECK(std::isnan(gelu_16_bit(NAN)) && std::isnan(gelu_16_bit(-INFINITY)));
}
