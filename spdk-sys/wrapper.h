/* The headers that bindgen reads. rte_config.h comes first because DPDK's headers expect it to be
 * forced in with `-include`, and fopencookie needs _GNU_SOURCE, which build.rs defines. */
#include <rte_config.h>

#include <stdio.h>

#include <rte_eal.h>
#include <rte_log.h>
#include <rte_version.h>
#include <rte_vhost.h>
