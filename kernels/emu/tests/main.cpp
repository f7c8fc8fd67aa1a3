// Runs the tests whose names contain the first argument; all without one.
#include "harness.h"

int main(int argc, char** argv) {
    int count = 0;
    for (Test* test = Test::first; test; test = test->next) {
        if (argc > 1 && !strstr(test->name, argv[1])) continue;
        emu::config = {};
        emu::config.quiet = true;
        running = test->name;
        test->run();
        count++;
    }
    printf("%d tests, %d failures\n", count, failures);
    return failures != 0 || count == 0;
}
