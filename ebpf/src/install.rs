//! Putting tables in force: filled aside, read back, compared, swapped in one step.

use crate::drift::{InForce, Sum};
use crate::error::KernelError;
use crate::kernel::{Kernel, Maps};
use crate::layout::{
    self, CONFIG_GENERATION, Field, Layout, RangeKey, RawEndpoint, RawEndpoint6, RawService, RawService6, RawVerdict,
    RawVerdictKey, Service6Key, ServiceKey,
};
use crate::pins::create_map;
use crate::tables::{Action, MAX_SERVICE_ENDPOINTS, Range, Service, ServiceEndpoint, Tables, Tier};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd};

/// Entries of one table as the kernel keeps them, sorted by key, each key once.
type Rows = Vec<(Vec<u8>, Vec<u8>)>;

/// One table of a generation, ready to be written.
struct Table {
    name: &'static str,
    kind: MapType,
    key: u32,
    value: u32,
    rows: Rows,
}

impl Kernel {
    /// Puts tables in force and returns the digest of what was read back from the kernel: SHA-256 over the sorted
    /// entries, equal for equal tables. On any error the tables in force stay as they were.
    ///
    /// Connections are judged by the old tables or by the new ones, never by a mixture: the swap is one number, and
    /// maps of a former generation are replaced only after every program that may read them has ended.
    pub fn install(&self, tables: &Tables) -> Result<[u8; 32], KernelError> {
        let encoded = self.admit(tables)?;
        let mut in_force = self.lock();
        let idle = 1 - self.live()?;
        let mut digest = Sha256::new();
        digest.update(b"ambit-tables 1\n");
        let mut filled = Vec::with_capacity(encoded.len());
        for table in &encoded {
            filled.push(fill(table)?);
        }
        for (table, inner) in encoded.iter().zip(&filled) {
            let found = read_back(inner, table)?;
            hash_rows(&mut digest, table.name, &found);
            self.put(table.name, idle, inner)?;
        }
        self.set_config(CONFIG_GENERATION, u64::from(idle))?;
        let [verdicts, endpoints, services, ranges, callers, endpoints6, services6] =
            encoded.each_ref().map(Table::sum);
        *in_force = Some(InForce { verdicts, endpoints, services, ranges, callers, endpoints6, services6 });
        // Writing a slot of a map of maps returns only after every running program has ended (the kernel's
        // maybe_wait_bpf_programs). Without this the next install could replace maps that a program still reads.
        if let (Some(table), Some(inner)) = (encoded.first(), filled.first()) {
            self.put(table.name, idle, inner)?;
        }
        Ok(digest.finalize().into())
    }

    /// Marks one endpoint of a service in force healthy or not, for connections from now on. A later `install` brings its
    /// own idea of health.
    pub fn set_service_health(
        &self,
        service: impl Into<SocketAddr>,
        endpoint: impl Into<SocketAddr>,
        healthy: bool,
    ) -> Result<(), KernelError> {
        let (service, endpoint) = match (service.into(), endpoint.into()) {
            (SocketAddr::V4(service), SocketAddr::V4(endpoint)) => (service, endpoint),
            (service, endpoint) => return self.set_service6_health(service, endpoint, healthy),
        };
        let mut in_force = self.lock();
        let missing = || KernelError::NotInstalled(format!("service {service} with endpoint {endpoint}"));
        let table = self.live_table("services")?.ok_or_else(missing)?;
        let key = service_key(service).to_bytes();
        let found = table.lookup(&key, MapFlags::ANY).map_err(|e| KernelError::bpf("read map services", e))?;
        let found = found.ok_or_else(missing)?;
        let mut value = RawService::from_bytes(&found).ok_or_else(missing)?;
        let (ip, port) = (layout::address(*endpoint.ip()), endpoint.port());
        let count = value.count as usize;
        let slot = value.endpoints.iter_mut().take(count).find(|e| e.address == ip && e.port == port);
        slot.ok_or_else(missing)?.healthy = u8::from(healthy);
        let services = in_force.as_mut().map(|put| &mut put.services);
        exchange(&table, "services", services, (&key, &found), &value.to_bytes())
    }

    fn set_service6_health(&self, service: SocketAddr, endpoint: SocketAddr, healthy: bool) -> Result<(), KernelError> {
        let mut in_force = self.lock();
        let missing = || KernelError::NotInstalled(format!("service {service} with endpoint {endpoint}"));
        let table = self.live_table("services6")?.ok_or_else(missing)?;
        let key = service6_key(service)?.to_bytes();
        let found = table.lookup(&key, MapFlags::ANY).map_err(|e| KernelError::bpf("read map services6", e))?;
        let found = found.ok_or_else(missing)?;
        let mut value = RawService6::from_bytes(&found).ok_or_else(missing)?;
        let (ip, port) = (mapped(endpoint.ip()), endpoint.port());
        let count = value.count as usize;
        let slot = value.endpoints.iter_mut().take(count).find(|e| e.address == ip && e.port == port);
        slot.ok_or_else(missing)?.healthy = u8::from(healthy);
        let services = in_force.as_mut().map(|put| &mut put.services6);
        exchange(&table, "services6", services, (&key, &found), &value.to_bytes())
    }

    /// Gives the endpoints at `addresses` the identity `identity` in the tables in force, at once and without an install, and
    /// says how many there were; as a service's endpoints they are marked unhealthy too. With an identity that no
    /// verdict speaks of, connections to them are refused from now on. Each step only takes away, so a mixture of old
    /// and new rows lets nothing through that the old ones did not. A later `install` brings its own rows.
    pub fn relabel<A: Into<IpAddr> + Copy>(&self, addresses: &[A], identity: u32) -> Result<usize, KernelError> {
        require_identity(identity, "relabelled endpoints")?;
        let addresses: Vec<IpAddr> = addresses.iter().map(|address| (*address).into()).collect();
        let (of_v4, of_v6): (Vec<_>, Vec<_>) = addresses.iter().partition(|address| address.is_ipv4());
        let keys = |addresses: &[IpAddr]| addresses.iter().map(|address| bytes(*address)).collect::<Vec<_>>();
        let mut in_force = self.lock();
        let mut found = 0;
        for (name, keys) in [("endpoints", keys(&of_v4)), ("endpoints6", keys(&of_v6))] {
            let Some(table) = self.live_table(name)? else { continue };
            for key in keys {
                let before = table.lookup(&key, MapFlags::ANY);
                // Where it is not, there is nothing to take away.
                let Some(before) = before.map_err(|e| KernelError::bpf(format!("read map {name}"), e))? else {
                    continue;
                };
                let sum = in_force.as_mut().map(|put| put.endpoints_of(name));
                exchange(&table, name, sum, (&key, &before), &identity.to_ne_bytes())?;
                found += 1;
            }
        }
        if let Some(table) = self.live_table("services")? {
            let addresses: BTreeSet<_> = of_v4.iter().filter_map(v4).map(layout::address).collect();
            let relabel = |value: &[u8]| {
                let mut service = RawService::from_bytes(value)?;
                let (count, mut changed) = (service.count as usize, None);
                for endpoint in service.endpoints.iter_mut().take(count).filter(|e| addresses.contains(&e.address)) {
                    (endpoint.identity, endpoint.healthy, changed) = (identity, 0, Some(()));
                }
                changed.map(|()| service.to_bytes())
            };
            exchange_services(&table, "services", relabel, in_force.as_mut().map(|put| &mut put.services))?;
        }
        if let Some(table) = self.live_table("services6")? {
            let addresses: BTreeSet<_> = addresses.iter().map(|address| mapped(*address)).collect();
            let relabel = |value: &[u8]| {
                let mut service = RawService6::from_bytes(value)?;
                let (count, mut changed) = (service.count as usize, None);
                for endpoint in service.endpoints.iter_mut().take(count).filter(|e| addresses.contains(&e.address)) {
                    (endpoint.identity, endpoint.healthy, changed) = (identity, 0, Some(()));
                }
                changed.map(|()| service.to_bytes())
            };
            exchange_services(&table, "services6", relabel, in_force.as_mut().map(|put| &mut put.services6))?;
        }
        Ok(found)
    }

    /// How full each map is that can be: its name, its entries now, and the most that it takes. The tables in force are made to
    /// measure, so an empty one counts as one.
    pub fn room(&self) -> Result<[(&'static str, u32, u32); 12], KernelError> {
        let capacity = self.capacity();
        let in_force = |name| Ok::<_, KernelError>(self.live_table(name)?.map_or(0, |table| table.max_entries()));
        let count = |map: &MapHandle| map.keys().take(map.max_entries() as usize).count() as u32;
        let Maps { workloads, flows, flows6, legs, .. } = self.maps();
        Ok([
            ("verdicts", in_force("verdicts")?, capacity.verdicts),
            ("endpoints", in_force("endpoints")?, capacity.endpoints),
            ("services", in_force("services")?, capacity.services),
            ("ranges", in_force("ranges")?, capacity.ranges),
            ("callers", in_force("callers")?, capacity.ranges),
            ("workloads", count(workloads), capacity.workloads),
            ("flows", count(flows), capacity.flows),
            ("stamps", self.stamps_held()?, capacity.stamps),
            ("endpoints6", in_force("endpoints6")?, capacity.endpoints),
            ("services6", in_force("services6")?, capacity.services),
            ("flows6", count(flows6), capacity.flows),
            ("legs", count(legs), capacity.flows),
        ])
    }

    fn admit(&self, tables: &Tables) -> Result<[Table; 7], KernelError> {
        let capacity = self.capacity();
        let sizes = [
            ("verdicts", capacity.verdicts, tables.verdicts.len()),
            ("endpoints", capacity.endpoints, tables.endpoints.len()),
            ("services", capacity.services, tables.services.len()),
            ("ranges", capacity.ranges, tables.ranges.len()),
            ("callers", capacity.ranges, tables.callers.len()),
            ("endpoints6", capacity.endpoints, tables.endpoints6.len()),
            ("services6", capacity.services, tables.services6.len()),
        ];
        for (map, capacity, needed) in sizes {
            if needed > capacity as usize {
                return Err(KernelError::MapFull { map, capacity, needed });
            }
        }
        Ok([
            verdict_table(tables)?,
            endpoint_table(tables)?,
            service_table(tables)?,
            range_table("ranges", &tables.ranges)?,
            range_table("callers", &tables.callers)?,
            endpoint6_table(tables)?,
            service6_table(tables)?,
        ])
    }

    /// Which of the two generations is in force.
    fn live(&self) -> Result<u32, KernelError> {
        Ok(if self.config(CONFIG_GENERATION)? == 0 { 0 } else { 1 })
    }

    fn put(&self, name: &'static str, generation: u32, inner: &MapHandle) -> Result<(), KernelError> {
        outer(self.maps(), name)
            .update(&generation.to_ne_bytes(), &inner.as_fd().as_raw_fd().to_ne_bytes(), MapFlags::ANY)
            .map_err(|e| KernelError::bpf(format!("write map {name}"), e))
    }

    /// The inner map in force; `None` before the first install.
    pub(crate) fn live_table(&self, name: &'static str) -> Result<Option<MapHandle>, KernelError> {
        let what = || format!("read map {name}");
        let id = outer(self.maps(), name).lookup(&self.live()?.to_ne_bytes(), MapFlags::ANY);
        let id = id.map_err(|e| KernelError::bpf(what(), e))?;
        let Some(id) = id.as_deref().and_then(|bytes| bytes.first_chunk().copied()) else { return Ok(None) };
        MapHandle::from_map_id(u32::from_ne_bytes(id)).map(Some).map_err(|e| KernelError::bpf(what(), e))
    }
}

fn outer<'k>(maps: &'k Maps, name: &'static str) -> &'k MapHandle {
    match name {
        "verdicts" => &maps.verdicts,
        "endpoints" => &maps.endpoints,
        "ranges" => &maps.ranges,
        "callers" => &maps.callers,
        "endpoints6" => &maps.endpoints6,
        "services6" => &maps.services6,
        _ => &maps.services,
    }
}

/// Writes another value for a key that is there, and takes note of it.
fn exchange(
    table: &MapHandle,
    name: &'static str,
    sum: Option<&mut Sum>,
    (key, before): (&[u8], &[u8]),
    after: &[u8],
) -> Result<(), KernelError> {
    table.update(key, after, MapFlags::EXIST).map_err(|e| KernelError::bpf(format!("write map {name}"), e))?;
    if let Some(sum) = sum {
        sum.exchange(key, before, after);
    }
    Ok(())
}

/// Writes what `other` makes of a service, where it makes something of it.
fn exchange_services(
    table: &MapHandle,
    name: &'static str,
    other: impl Fn(&[u8]) -> Option<Vec<u8>>,
    mut sum: Option<&mut Sum>,
) -> Result<(), KernelError> {
    // One batch with a place to spare, as for reading back.
    let rows = table
        .lookup_batch(table.max_entries() + 1, MapFlags::ANY, MapFlags::ANY)
        .map_err(|e| KernelError::bpf(format!("read map {name}"), e))?;
    for (key, value) in rows {
        if let Some(after) = other(&value) {
            exchange(table, name, sum.as_deref_mut(), (&key, &value), &after)?;
        }
    }
    Ok(())
}

fn verdict_table(tables: &Tables) -> Result<Table, KernelError> {
    let mut rows = Rows::with_capacity(tables.verdicts.len());
    for (key, verdict) in &tables.verdicts {
        require_identity(key.source, "a verdict's source")?;
        require_identity(key.destination, "a verdict's destination")?;
        let raw = RawVerdictKey { source: key.source, destination: key.destination, port: key.port, pad: 0 };
        let action = match verdict.action {
            Action::Deny => 0,
            Action::Allow => 1,
        };
        rows.push((raw.to_bytes(), RawVerdict { action, rule: verdict.rule }.to_bytes()));
    }
    table("verdicts", RawVerdictKey::SIZE, RawVerdict::SIZE, rows)
}

fn endpoint_table(tables: &Tables) -> Result<Table, KernelError> {
    let mut rows = Rows::with_capacity(tables.endpoints.len());
    for (address, identity) in &tables.endpoints {
        require_identity(*identity, "an endpoint")?;
        rows.push((layout::address(*address).to_vec(), identity.to_ne_bytes().to_vec()));
    }
    table("endpoints", 4, 4, rows)
}

fn service_table(tables: &Tables) -> Result<Table, KernelError> {
    let mut rows = Rows::with_capacity(tables.services.len());
    for service in &tables.services {
        rows.push((service_key(service.address).to_bytes(), raw_service(service)?.to_bytes()));
    }
    table("services", ServiceKey::SIZE, RawService::SIZE, rows)
}

fn endpoint6_table(tables: &Tables) -> Result<Table, KernelError> {
    let mut rows = Rows::with_capacity(tables.endpoints6.len());
    for (address, identity) in &tables.endpoints6 {
        require_identity(*identity, "an endpoint")?;
        require_native(*address)?;
        rows.push((address.octets().to_vec(), identity.to_ne_bytes().to_vec()));
    }
    table("endpoints6", 16, 4, rows)
}

fn service6_table(tables: &Tables) -> Result<Table, KernelError> {
    let mut rows = Rows::with_capacity(tables.services6.len());
    for service in &tables.services6 {
        rows.push((service6_key(service.address)?.to_bytes(), raw_service6(service)?.to_bytes()));
    }
    table("services6", Service6Key::SIZE, RawService6::SIZE, rows)
}

fn range_table(name: &'static str, ranges: &[Range]) -> Result<Table, KernelError> {
    let mut rows = Rows::with_capacity(ranges.len());
    for range in ranges {
        require_identity(range.number, "a range")?;
        let (bits, first) = (u32::from(range.bits), range.first.to_bits());
        if bits > 32 || first.checked_shl(bits).unwrap_or(0) != 0 {
            return Err(KernelError::BadTables(format!("range {}/{bits} has bits behind its prefix", range.first)));
        }
        let key = RangeKey { bits, address: layout::address(range.first) };
        rows.push((key.to_bytes(), range.number.to_ne_bytes().to_vec()));
    }
    Ok(Table { kind: MapType::LpmTrie, ..table(name, RangeKey::SIZE, 4, rows)? })
}

/// What the kernel keeps of an endpoint whatever its family: its identity, tier and health.
fn kept<A: std::fmt::Display>(
    service: &A,
    endpoints: &[ServiceEndpoint<A>],
) -> Result<Vec<(u32, u8, u8)>, KernelError> {
    let count = endpoints.len();
    if count > MAX_SERVICE_ENDPOINTS {
        return Err(KernelError::BadTables(format!(
            "service {service} has {count} endpoints, not {MAX_SERVICE_ENDPOINTS}"
        )));
    }
    let one = |endpoint: &ServiceEndpoint<A>| {
        require_identity(endpoint.identity, "a service's endpoint")?;
        let tier = match endpoint.tier {
            Tier::Local => 0,
            Tier::Remote => 1,
        };
        Ok((endpoint.identity, tier, u8::from(endpoint.healthy)))
    };
    endpoints.iter().map(one).collect()
}

fn raw_service6(service: &Service<SocketAddr>) -> Result<RawService6, KernelError> {
    let kept = kept(&service.address, &service.endpoints)?;
    let mut raw = RawService6 { count: service.endpoints.len() as u32, ..Default::default() };
    for ((slot, endpoint), (identity, tier, healthy)) in raw.endpoints.iter_mut().zip(&service.endpoints).zip(kept) {
        let (address, port) = (mapped(endpoint.address.ip()), endpoint.address.port());
        *slot = RawEndpoint6 { address, identity, port, tier, healthy };
    }
    Ok(raw)
}

fn raw_service(service: &Service) -> Result<RawService, KernelError> {
    let kept = kept(&service.address, &service.endpoints)?;
    let mut raw = RawService { count: service.endpoints.len() as u32, ..Default::default() };
    for ((slot, endpoint), (identity, tier, healthy)) in raw.endpoints.iter_mut().zip(&service.endpoints).zip(kept) {
        let (address, port) = (layout::address(*endpoint.address.ip()), endpoint.address.port());
        *slot = RawEndpoint { address, identity, port, tier, healthy };
    }
    Ok(raw)
}

fn service_key(address: SocketAddrV4) -> ServiceKey {
    ServiceKey { address: layout::address(*address.ip()), port: address.port(), pad: 0 }
}

fn service6_key(address: SocketAddr) -> Result<Service6Key, KernelError> {
    match address {
        SocketAddr::V6(address) => {
            require_native(*address.ip())?;
            Ok(Service6Key { address: address.ip().octets(), port: address.port(), pad: 0 })
        }
        SocketAddr::V4(_) => Err(KernelError::BadTables(format!("{address} among the services of IPv6"))),
    }
}

/// A program that is asked for a v4-mapped address looks in the tables of IPv4.
fn require_native(address: Ipv6Addr) -> Result<(), KernelError> {
    if address.to_ipv4_mapped().is_none() {
        return Ok(());
    }
    Err(KernelError::BadTables(format!("{address} among the addresses of IPv6")))
}

/// As tables have it in which either family may be.
fn mapped(address: IpAddr) -> layout::Address6 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// As the table of its family has it.
fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

fn v4(address: &IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    }
}

fn require_identity(identity: u32, of: &str) -> Result<(), KernelError> {
    if identity == 0 { Err(KernelError::BadTables(format!("identity 0 for {of}"))) } else { Ok(()) }
}

/// Sorts, and refuses a key that comes twice: the last one would win silently.
fn table(name: &'static str, key: usize, value: usize, mut rows: Rows) -> Result<Table, KernelError> {
    rows.sort();
    if rows.windows(2).any(|pair| matches!(pair, [a, b] if a.0 == b.0)) {
        return Err(KernelError::BadTables(format!("a key of {name} comes twice")));
    }
    Ok(Table { name, kind: MapType::Hash, key: key as u32, value: value as u32, rows })
}

impl Table {
    fn sum(&self) -> Sum {
        Sum::of(self.rows.iter().map(|(key, value)| (key.as_slice(), value.as_slice())))
    }
}

/// A fresh inner map of exactly the size needed (an inner map may differ in that from its template).
fn fill(table: &Table) -> Result<MapHandle, KernelError> {
    let count = table.rows.len() as u32;
    let inner = create_map(table.kind, table.name, table.key, table.value, count.max(1))
        .map_err(|e| KernelError::bpf(format!("make map {}", table.name), e))?;
    if count > 0 {
        let keys: Vec<u8> = table.rows.iter().flat_map(|row| row.0.iter().copied()).collect();
        let values: Vec<u8> = table.rows.iter().flat_map(|row| row.1.iter().copied()).collect();
        inner
            .update_batch(&keys, &values, count, MapFlags::ANY, MapFlags::ANY)
            .map_err(|e| KernelError::bpf(format!("fill map {}", table.name), e))?;
    }
    Ok(inner)
}

fn read_back(inner: &MapHandle, table: &Table) -> Result<Rows, KernelError> {
    // One batch with a place to spare: the kernel refuses a batch that cannot hold a whole bucket.
    let count = table.rows.len() as u32 + 1;
    let mut found: Rows = inner
        .lookup_batch(count, MapFlags::ANY, MapFlags::ANY)
        .map_err(|e| KernelError::bpf(format!("read map {}", table.name), e))?
        .take(count as usize)
        .collect();
    found.sort();
    if found == table.rows { Ok(found) } else { Err(KernelError::ReadBack { map: table.name }) }
}

fn hash_rows(digest: &mut Sha256, name: &str, rows: &Rows) {
    digest.update(format!("{name} {}\n", rows.len()));
    for (key, value) in rows {
        digest.update(key);
        digest.update(value);
    }
}
