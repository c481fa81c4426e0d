// linear_scan.cu -- the state before each span, from the sums of each span. A thread does one number
// of a state, from the first span to the last, or back.
#include "linear.cuh"

struct ScanArguments {
    States given, after;        // one span each; at = 0: zeros, and not wanted
    States states;              // of each span its sums, which become the state before it
    int spans, f, e, normalize, backwards;
};

enum { AT_ONCE = 8 };

DEVICE Sum& number_of(const States& states, int pair, int span, int f, int e, int width) {
    Sum* place = states.of(pair, span);
    return e < width ? place[i64(f) * states.row + e] : place[states.last + i64(f) * states.last_row];
}

extern "C" __global__ void __launch_bounds__(THREADS)
linear_scan(const __grid_constant__ ScanArguments a) {
    const int number = blockIdx.x * THREADS + threadIdx.x;
    const int pair = blockIdx.y;
    const int f = number / (a.e + a.normalize);
    const int e = number % (a.e + a.normalize);
    if (f >= a.f)
        return;
    Sum sum = a.given.at ? number_of(a.given, pair, 0, f, e, a.e) : Sum(0);
    for (int first = 0; first < a.spans; first += AT_ONCE) {
        Sum own[AT_ONCE];
        UNROLL
        for (int i = 0; i < AT_ONCE; i++) {
            const int span = a.backwards ? a.spans - 1 - first - i : first + i;
            own[i] = first + i < a.spans ? number_of(a.states, pair, span, f, e, a.e) : Sum(0);
        }
        UNROLL
        for (int i = 0; i < AT_ONCE; i++) {
            const int span = a.backwards ? a.spans - 1 - first - i : first + i;
            if (first + i < a.spans)
                number_of(a.states, pair, span, f, e, a.e) = sum;
            sum += own[i];
        }
    }
    if (a.after.at)
        number_of(a.after, pair, 0, f, e, a.e) = sum;
}
