#include <cstdio>
#include <string_view>

#include "core/cpu_level.h"
#include "test.h"

// What make and meson take for "skipped": the processor lacks the level that MODELTORCH_CPU_LEVEL asks for.
constexpr int kSkipped = 77;

int main(int argc, char** argv) {
  try {
    std::printf("processor level %s: ", modeltorch::cpu_level_name(modeltorch::cpu_level()));
    std::fflush(stdout);
  } catch (const modeltorch::Error& error) {
    std::printf("%s\n", error.what());
    const bool lacks_level =
        std::string_view(error.what()).find("more than this processor has") != std::string_view::npos;
    return lacks_level ? kSkipped : 1;
  }
  return test::run_all(argc > 1 ? argv[1] : "");
}
