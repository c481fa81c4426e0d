// linear_scan.cu -- the state before each span, from the sums of each span. A thread does one
// number of a state, from the first span to the last, or back.
#include "linear.cuh"

struct ScanArguments {
    LinearArguments walk;       // as that of the sums
    States given, after;        // one span each; at = 0: zeros, and not wanted
    States states;              // of each span its sums, which become the state before it
    int spans;
};

enum { AT_ONCE = 8 };

DEVICE Sum& number_of(const States& states, int pair, int span, int f, int e, int width) {
    Sum* place = states.of(pair, span);
    return place[e < width ? i64(f) * states.row + e : states.last + i64(f) * states.last_row];
}

// Of kind EXP what a state is multiplied by on its way through a span.
DEVICE Sum kept(const LinearArguments& a, const Sequence& sequence, int pair, int span) {
    if (KIND != EXP || (!CAUSAL && PASS >= DV))
        return 1;
    const Sum* running = a.running + i64(pair) * (a.chunks + 1);
    const int begin = min(span * a.each, sequence.steps);
    const int end = min(begin + a.each, sequence.steps);
    const int first = sequence.first / TOKENS;
    return exponential(running[clipped(first + begin, a.chunks)]
                       - subtractable(running[clipped(first + end, a.chunks)]));
}

extern "C" __global__ void __launch_bounds__(THREADS)
linear_scan(const __grid_constant__ ScanArguments arguments) {
    const LinearArguments& a = arguments.walk;
    const int number = blockIdx.x * THREADS + threadIdx.x;
    const int pair = blockIdx.y;
    const int f = number / (a.e + a.vector);
    const int e = number % (a.e + a.vector);
    if (f >= a.f)
        return;
    const Sequence sequence(a, pair / a.groups);
    Sum sum = arguments.given.at ? number_of(arguments.given, pair, 0, f, e, a.e) : Sum(0);
    for (int first = 0; first < arguments.spans; first += AT_ONCE) {
        Sum own[AT_ONCE];
        UNROLL
        for (int i = 0; i < AT_ONCE; i++) {
            const int span = PASS >= DV ? arguments.spans - 1 - first - i : first + i;
            own[i] = 0;
            if (first + i < arguments.spans)
                own[i] = number_of(arguments.states, pair, span, f, e, a.e);
        }
        UNROLL
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i >= arguments.spans)
                break;
            const int span = PASS >= DV ? arguments.spans - 1 - first - i : first + i;
            number_of(arguments.states, pair, span, f, e, a.e) = sum;
            sum = times_plus(sum, kept(a, sequence, pair, span), own[i]);
        }
    }
    if (arguments.after.at)
        number_of(arguments.after, pair, 0, f, e, a.e) = sum;
}
