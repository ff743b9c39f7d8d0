/* Makes each system call of the numbers it is given, with zeros as arguments, and says what came of it:

       NUMBER errno N | NUMBER signal N | NUMBER done

   A number may be followed by a colon and a first argument. Each is made by a child of its own, which is killed where
   it does not come back. What happens to the child happens to nobody else. Without a number it waits for ever. */

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#define CAME_BACK 77

static void make(const char *text, int result)
{
    char *rest;
    long number = strtol(text, &rest, 10);
    long argument = *rest == ':' ? strtol(rest + 1, NULL, 0) : 0;
    alarm(1);
    errno = 0;
    long answer = syscall(number, argument, 0, 0, 0, 0, 0);
    int error = answer == -1 ? errno : 0;
    write(result, &error, sizeof error);
    _exit(CAME_BACK);
}

int main(int count, char **numbers)
{
    while (count == 1)
        pause();
    for (int i = 1; i < count; i++) {
        int ends[2], error = 0, status = 0;
        if (pipe(ends))
            return 1;
        pid_t child = fork();
        if (child == 0)
            make(numbers[i], ends[1]);
        close(ends[1]);
        if (child == -1 || waitpid(child, &status, 0) != child)
            return 1;
        int told = read(ends[0], &error, sizeof error) == sizeof error;
        close(ends[0]);
        if (WIFSIGNALED(status) && !told)
            printf("%s signal %d\n", numbers[i], WTERMSIG(status));
        else if (told && error)
            printf("%s errno %d\n", numbers[i], error);
        else
            printf("%s done\n", numbers[i]);
    }
    return 0;
}
