# Builds check_core with the compiled core. The caller sets OUT, FLAGS and CXX; each set of flags needs its own OUT.
CXX ?= g++
OBJECTS := $(patsubst csrc/cpu/%.cpp,$(OUT)/%.o,$(wildcard csrc/cpu/*.cpp)) $(OUT)/check_core.o

$(OUT)/check_core: $(OBJECTS)
	$(CXX) $(FLAGS) $^ -o $@

$(OUT)/%.o: csrc/cpu/%.cpp
	@mkdir -p $(OUT)
	$(CXX) -std=c++20 -fno-math-errno -Wno-psabi $(FLAGS) -MMD -c $< -o $@

# Optimised and without sanitizers: the definition takes most of the time, and it is not what is being checked.
$(OUT)/check_core.o: tests/native/core/check_core.cpp
	@mkdir -p $(OUT)
	$(CXX) -std=c++20 -Wall -Wextra -Wno-psabi $(filter-out -O% -fsanitize=%,$(FLAGS)) -O2 -Icsrc -MMD -c $< -o $@

-include $(OBJECTS:.o=.d)
