"""A plugin of SPDK's client spdk-rpc: the RPC methods and parameters that vhost has and SPDK does not.

    export PYTHONPATH=/path/to/clients        # not needed for the client that ci/setup installs
    spdk-rpc --plugin vhost_rpc -s /run/vhost/rpc.sock vhost_delete_controller vhost.0 --force

It adds the options --force and --timeout-ms to the client's vhost_delete_controller, --packed-ring to
vhost_create_scsi_controller, --timeout-ms to vhost_scsi_controller_remove_target, and the subcommands bdev_nbd_create,
bdev_nbd_delete, vhost_move_queue, vhost_get_controller_stats and vhost_get_reactor_turns. All other subcommands remain as
they are.

It uses Python's standard library and three things of the client: the function that the client calls, the subcommands'
function `func(args)`, and `args.client.call(method, params)`. So it works with other releases of the client, too.
"""

import argparse
import json

# The longest time that the client may wait for an answer: a socket's timeout is less than 2**31 ms, about 24 days.
CLIENT_TIMEOUT_MAX_MS = 2_000_000_000


def spdk_rpc_plugin_initialize(subparsers):
    """Adds the subcommands. The client calls this function by its name."""
    extend_delete_controller(subparsers)
    extend_scsi_controllers(subparsers)
    add_nbd(subparsers)
    add_move_queue(subparsers)
    add_controller_stats(subparsers)
    add_longest_iterations(subparsers)


def extend_delete_controller(subparsers):
    def vhost_delete_controller(args):
        # Without the options, this is the request that the client sends without the plugin.
        params = {"ctrlr": args.ctrlr}
        if args.timeout_ms is not None:
            params["timeout_ms"] = args.timeout_ms
            extend_client_timeout(args, args.timeout_ms)
        if args.force:
            params["force"] = True
        args.client.call("vhost_delete_controller", params)

    # Extended, as argparse refuses a second subcommand of the same name.
    p = subparsers.choices.get("vhost_delete_controller")
    if p is None:
        p = subparsers.add_parser("vhost_delete_controller", help="Delete a vhost controller")
        p.add_argument("ctrlr", help="Name of the vhost controller")
    p.description = """Delete a vhost controller. New connections are refused, and the call returns when all front ends
        have disconnected and the socket is removed. If a front end is still connected after the timeout, the call fails
        with "Device or resource busy", and the controller remains."""
    group = own_options(p)
    group.add_argument("-f", "--force", action="store_true",
                       help="Close the connections instead of waiting for front ends to disconnect. I/O in flight is "
                            "waited for until the timeout; the controller is deleted in any case. Default: false")
    group.add_argument("--timeout-ms", type=non_negative, metavar="MS",
                       help="How long to wait, in milliseconds. 0 does not wait. Default: 5000")
    p.set_defaults(func=vhost_delete_controller)


def extend_scsi_controllers(subparsers):
    def vhost_create_scsi_controller(args):
        params = {"ctrlr": args.ctrlr, "packed_ring": True}
        # Releases of the client differ in the options that they have.
        params.update({key: value for key in ("cpumask", "delay") if (value := getattr(args, key, None))})
        args.client.call("vhost_create_scsi_controller", params)

    def vhost_scsi_controller_remove_target(args):
        params = {"ctrlr": args.ctrlr, "scsi_target_num": args.scsi_target_num, "timeout_ms": args.timeout_ms}
        extend_client_timeout(args, args.timeout_ms)
        args.client.call("vhost_scsi_controller_remove_target", params)

    p = subparsers.choices.get("vhost_create_scsi_controller")
    if p is not None:
        own_options(p).add_argument("--packed-ring", action="store_true", help="Offer packed rings. Default: false")
        call_with(p, "packed_ring", vhost_create_scsi_controller)

    p = subparsers.choices.get("vhost_scsi_controller_remove_target")
    if p is not None:
        p.description = """Remove a target from a vhost SCSI controller. Guests do not see it any more, and the call
            returns when no queue uses its bdev. If commands are still in progress after the timeout, the call fails with
            "Device or resource busy", and the target is removed when they have ended."""
        own_options(p).add_argument("--timeout-ms", type=non_negative, metavar="MS",
                                    help="How long to wait, in milliseconds. 0 does not wait. Default: 5000")
        call_with(p, "timeout_ms", vhost_scsi_controller_remove_target)


def own_options(parser):
    """A group for the options that are added to a subcommand of the client."""
    # Should a release of the client have options of these names, those that are added replace them.
    parser.conflict_handler = "resolve"
    return parser.add_argument_group("options of vhost that SPDK does not have")


def call_with(parser, option, function):
    """Has a subcommand call a function if the option is given. Otherwise it does what it does without the plugin."""
    plain = parser.get_default("func")

    def chosen(args):
        value = getattr(args, option)
        (plain if value is None or value is False else function)(args)

    parser.set_defaults(func=chosen)


def add_nbd(subparsers):
    def bdev_nbd_create(args):
        params = {"name": args.name, "uri": args.uri}
        for key in ("block_size", "uuid", "reconnect_delay_sec", "connections"):
            if getattr(args, key) is not None:
                params[key] = getattr(args, key)
        if args.readonly:
            params["readonly"] = True
        show(args.client.call("bdev_nbd_create", params))

    p = subparsers.add_parser(
        "bdev_nbd_create",
        help="Create a bdev on an export of an NBD server",
        description="""Create a bdev on an export of an NBD server. I/O waits while the server is away, unless there is
            a reconnect delay.""")
    p.add_argument("name", help="Name of the bdev")
    p.add_argument("uri", help="nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")
    p.add_argument("-b", "--block-size", type=non_negative, metavar="BYTES",
                   help="Block size. Default: 512, or the server's minimum")
    p.add_argument("-r", "--readonly", action="store_true", help="Refuse writes. Default: false")
    p.add_argument("-u", "--uuid", help="UUID of the bdev. Default: derived from URI and name")
    p.add_argument("--reconnect-delay-sec", type=non_negative, metavar="S",
                   help="I/O fails after so many seconds without a server. Default: it waits for ever")
    p.add_argument("--connections", type=non_negative, metavar="N",
                   help="Number of connections, if the server allows several. Default: 4")
    p.set_defaults(func=bdev_nbd_create)

    def bdev_nbd_delete(args):
        args.client.call("bdev_nbd_delete", {"name": args.name})

    p = subparsers.add_parser("bdev_nbd_delete", help="Delete a bdev of bdev_nbd_create",
                              description="Delete a bdev of bdev_nbd_create.")
    p.add_argument("name", help="Name of the bdev")
    p.set_defaults(func=bdev_nbd_delete)


def add_move_queue(subparsers):
    def vhost_move_queue(args):
        params = {"ctrlr": args.ctrlr, "queue": args.queue, "core": args.core}
        if args.session is not None:
            params["session"] = args.session
        args.client.call("vhost_move_queue", params)

    p = subparsers.add_parser(
        "vhost_move_queue",
        help="Move a queue of a vhost controller to another core",
        description="""Move a queue of a vhost controller to another core, and return when that core serves it. I/O in
            flight moves along, and the guest notices nothing. To move all queues of a controller, use
            thread_set_cpumask.""")
    p.add_argument("ctrlr", help="Name of the vhost controller")
    p.add_argument("queue", type=non_negative, help="Number of the queue; the first one is 0")
    p.add_argument("core", type=non_negative, help="Core that is to serve the queue, one of the controller's cpumask")
    p.add_argument("--session", type=non_negative, metavar="ID",
                   help="The connection that the queue belongs to: the `id` of a session that vhost_get_controllers "
                        "shows. Required if several front ends are connected to the controller")
    p.set_defaults(func=vhost_move_queue)


def add_controller_stats(subparsers):
    def vhost_get_controller_stats(args):
        params = {} if args.name is None else {"name": args.name}
        show(args.client.call("vhost_get_controller_stats", params))

    p = subparsers.add_parser(
        "vhost_get_controller_stats",
        help="Show states and counters of all or specific vhost controller(s)",
        description="""Show the states and counters that vhost_get_controllers of SPDK does not have: of each session
            its state, its requests and errors, the core of each of its queues, and guest memory that is still mapped
            for I/O in flight; of each controller its file descriptors.""")
    p.add_argument("-n", "--name", help="Name of a specific vhost controller to query. Default: show all")
    p.set_defaults(func=vhost_get_controller_stats)


def add_longest_iterations(subparsers):
    def vhost_get_reactor_turns(args):
        params = {"reset": True} if args.reset else {}
        show(args.client.call("vhost_get_reactor_turns", params))

    p = subparsers.add_parser(
        "vhost_get_reactor_turns",
        help="Show the longest poll iteration of each reactor",
        description="""Show for each reactor how many poll iterations it has done and how often it has slept, the
            duration of the longest iteration in microseconds, and what happened in that iteration. While an iteration
            takes long, all queues of the reactor wait.""")
    p.add_argument("-r", "--reset", action="store_true",
                   help="Start a new measurement: the next call shows the longest iteration since this call. "
                        "Default: false")
    p.set_defaults(func=vhost_get_reactor_turns)


def show(result):
    """Prints a result as the client does. There is none if the request was only printed or put into a batch."""
    if result is not None:
        print(json.dumps(result, indent=2))


def extend_client_timeout(args, by_ms):
    """Has the client wait longer than its 60 s for an answer, unless its option -t says how long it is to wait.

    Otherwise the client would disconnect first, which cancels a deletion. The times add up because the requests of a
    batch are waited for together.
    """
    timeout_s = getattr(args.client, "timeout", None)
    # A client that only prints requests has no timeout.
    if args.timeout is None and isinstance(timeout_s, float):
        args.client.timeout = min(int(timeout_s * 1000) + by_ms, CLIENT_TIMEOUT_MAX_MS) / 1000


def non_negative(text):
    """The type of numbers on the command line."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a non-negative integer, got {text!r}")
    return number
