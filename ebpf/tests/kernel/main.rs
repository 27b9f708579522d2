//! The kernel side with real programs, sockets, cgroups and network namespaces. Needs root; fails, never skips, without.

mod connect;
mod generations;
mod inbound;
mod support;
