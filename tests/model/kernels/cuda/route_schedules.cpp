// Runs route.cu (given with -include) on the inputs in a folder under several random schedules, in buffers of exactly
// the size that each needs. Prints the reason and exits with 1 unless all schedules give the bits of the first.
//
//   route_schedules FOLDER N R E k CHUNKS DROP_SCORES HAS_KEEP SCHEDULES REMOVED_BARRIER_LINE

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

template <class T> std::vector<T> read(const std::string& path, size_t size) {
    std::vector<T> values(size);
    std::ifstream file(path, std::ios::binary);
    file.read(reinterpret_cast<char*>(values.data()), std::streamsize(size * sizeof(T)));
    if (!file) {
        fprintf(stderr, "cannot read %zu bytes of %s\n", size * sizeof(T), path.c_str());
        exit(2);
    }
    return values;
}

template <class T> void write(const std::string& path, const std::vector<T>& values) {
    std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(values.data()),
                                                std::streamsize(values.size() * sizeof(T)));
}

template <class T> std::vector<T> garbage(size_t size) {
    std::vector<T> values(size);
    values.shrink_to_fit();
    memset(values.data(), 0xA5, size * sizeof(T));
    return values;
}

struct Result {
    std::vector<float> scores, grad;
    std::vector<int64_t> index, load, order;
    bool operator==(const Result& other) const {
        return scores == other.scores && grad == other.grad && index == other.index && load == other.load &&
               order == other.order;
    }
};

int main(int argc, char** argv) {
    if (argc != 11) return 2;
    const std::string folder = std::string(argv[1]) + "/";
    int numbers[9];
    for (int i = 0; i < 9; i++) numbers[i] = atoi(argv[i + 2]);
    const auto [N, R, E, k, chunks, drop_scores, has_keep, schedules, removed_barrier] = numbers;
    const size_t experts = size_t(N) * R * E, choices = size_t(N) * R * k;
    const auto logits = read<float>(folder + "logits", experts), grad_logits = read<float>(folder + "grad_logits", experts);
    const auto grad_scores = read<float>(folder + "grad_scores", choices);
    const auto keep = has_keep ? read<uint8_t>(folder + "keep", experts) : std::vector<uint8_t>();

    Result first;
    for (int schedule = 0; schedule < schedules; schedule++) {
        Result r{garbage<float>(choices), garbage<float>(experts), garbage<int64_t>(choices), garbage<int64_t>(size_t(R) * E),
                 garbage<int64_t>(choices)};
        auto chosen = garbage<uint8_t>(choices);
        auto counts = garbage<int>(size_t(R) * chunks * E);
        simt_schedule(unsigned(schedule), removed_barrier);
        int code = switchall_route(logits.data(), has_keep ? keep.data() : nullptr, drop_scores, N, R, E, k, chunks,
                                   r.scores.data(), r.index.data(), chosen.data(), counts.data(), r.load.data(),
                                   r.order.data(), 0, nullptr);
        if (code == 0) {
            code = switchall_route_gradient(grad_logits.data(), grad_scores.data(), r.scores.data(), r.index.data(), N, R,
                                            E, k, r.grad.data(), 0, nullptr);
        }
        if (code != 0) {
            fprintf(stderr, "schedule %d: %s\n", schedule, switchall_error(code));
            return 1;
        }
        if (schedule == 0) first = r;
        if (!(r == first)) {
            fprintf(stderr, "schedule %d gives another result than schedule 0\n", schedule);
            return 1;
        }
    }
    write(folder + "scores", first.scores);
    write(folder + "grad", first.grad);
    write(folder + "index", first.index);
    write(folder + "load", first.load);
    write(folder + "order", first.order);
    return 0;
}
