//! Interrupts: which controllers the machine has, and the lines of its devices.

pub mod ioapic;

use crate::layout;
use crate::virtio::device::Interrupt;
use ioapic::{Message, Router};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use std::io;
use std::sync::Arc;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Who emulates the interrupt controllers other than the local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controllers {
    /// KVM has the local APICs only; the IOAPIC is [`ioapic::IoApic`], and there is no PIC. Least code in the
    /// host's kernel that a guest can reach.
    Split,
    /// KVM has them all, PICs included.
    Kernel,
}

/// What this VMM uses.
pub const CONTROLLERS: Controllers = Controllers::Split;

/// Makes the interrupt controllers in KVM. To be called before the first vCPU is made.
///
/// # Errors
/// When KVM cannot.
pub fn create(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    match CONTROLLERS {
        Controllers::Split => vm.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            args: [layout::IOAPIC_PINS as u64, 0, 0, 0],
            ..Default::default()
        }),
        Controllers::Kernel => vm.create_irq_chip(),
    }
}

/// A new interrupt line that raises `irq` of the guest.
///
/// # Errors
/// When no descriptor is to be had or KVM refuses it.
pub fn line(vm: &VmFd, irq: u32) -> io::Result<Interrupt> {
    let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
    vm.register_irqfd(&event, irq).map_err(io::Error::from)?;
    Ok(Interrupt::new(event))
}

impl Router for Arc<VmFd> {
    fn set_routes(&mut self, routes: &[(u32, Message)]) -> io::Result<()> {
        let entries: Vec<_> = routes
            .iter()
            .map(|(gsi, message)| kvm_irq_routing_entry {
                gsi: *gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 {
                    msi: kvm_irq_routing_msi {
                        address_lo: message.address,
                        data: message.data,
                        ..Default::default()
                    },
                },
                ..Default::default()
            })
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, format!("{e:?}")))?;
        self.set_gsi_routing(&routing).map_err(io::Error::from)
    }
}
