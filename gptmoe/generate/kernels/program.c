/* Kernels one after the other, as one call: only the threads meet between them. */

#include <stdint.h>
#include <string.h>

typedef struct {
    void (*kernel)(void *task);
    void *task;       /* begins with counters, */
    int64_t counters; /* so many, of 64 bits each */
} Call;

typedef struct {
    void (*on_threads)(void (*function)(void *), void *argument, unsigned threads, unsigned flags);
    void (*meet)(void);
    const Call *calls;
    int64_t count;
} Program;

static void all_calls(void *argument)
{
    const Program *program = argument;
    for (int64_t c = 0; c < program->count; c++) {
        program->calls[c].kernel(program->calls[c].task);
        program->meet();
    }
}

void run_program(Program *program, unsigned threads)
{
    for (int64_t c = 0; c < program->count; c++)
        memset(program->calls[c].task, 0, program->calls[c].counters * sizeof(int64_t));
    program->on_threads(all_calls, program, threads, 0);
}
