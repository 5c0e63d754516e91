/// Runs every native test, or those whose names contain an argument.
#include "check.hpp"

int main(int argc, char **argv) {
    int run = 0;
    for (const Test &test : all_tests()) {
        bool wanted = argc < 2;
        for (int i = 1; i < argc; ++i) wanted = wanted || std::strstr(test.name, argv[i]);
        if (!wanted) continue;
        std::printf("%s\n", test.name);
        std::fflush(stdout);
        test.body();
        ++run;
    }
    std::printf("%d tests passed\n", run);
    return run == 0;
}
