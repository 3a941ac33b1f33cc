/* Preloaded into a server: makes one unmapping of 1 MiB or more take four seconds.
 *
 * SLOW_MUNMAP names a directory. When somebody puts a file "armed" there, the next such unmapping
 * renames it to "sleeping", sleeps, renames it to "slept", and goes on.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int munmap(void *addr, size_t len)
{
	const char *dir = getenv("SLOW_MUNMAP");
	char armed[256], sleeping[256], slept[256];

	if (dir && len >= 1 << 20) {
		snprintf(armed, sizeof(armed), "%s/armed", dir);
		snprintf(sleeping, sizeof(sleeping), "%s/sleeping", dir);
		snprintf(slept, sizeof(slept), "%s/slept", dir);
		if (rename(armed, sleeping) == 0) {
			sleep(4);
			rename(sleeping, slept);
		}
	}
	return syscall(SYS_munmap, addr, len);
}
